"""The readers of strangers' files: whatever is spoiled, they read it or refuse it in one line that names the file."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hostile import READERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """The good files of every reader."""
    return {name: reader.seeds(tmp_path_factory.mktemp(name)) for name, reader in READERS.items()}


@pytest.mark.filterwarnings("ignore:.*pre-tokenizer:UserWarning")
@pytest.mark.parametrize("name", READERS)
def test_good_files_are_read(seeds, tmp_path, name):
    for seed in seeds[name]:
        with TemporaryDirectory(dir=tmp_path) as folder:
            READERS[name].read(Path(folder), seed)


@pytest.mark.filterwarnings("ignore:.*pre-tokenizer:UserWarning", "ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("name", READERS)
@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=True), which=st.integers(0, 99), times=st.integers(1, 3))
def test_spoiled_files_are_read_or_refused(seeds, tmp_path, name, rng, which, times):
    raw = seeds[name][which % len(seeds[name])]
    for _ in range(times):
        raw = READERS[name].spoil(raw, rng)
    with TemporaryDirectory(dir=tmp_path) as folder:
        READERS[name].read(Path(folder), raw)


@pytest.mark.parametrize("name", ["gguf", "shards", "imatrix", "safetensors", "torch"])
def test_files_cut_off_anywhere_are_read_or_refused(seeds, tmp_path, name):
    for seed in seeds[name]:
        for end in range(len(seed)):
            READERS[name].read(tmp_path, seed[:end])
