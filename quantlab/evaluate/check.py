"""Checks that the evaluator supports a model completely: architecture, tensors and shapes."""

from dataclasses import replace

from quantlab.arch import Architecture, architectures, find
from quantlab.transform.rules import layer_of, squeezed

ROPE_SCALINGS = ("linear", "yarn")
VARYING = (
    "recurrent",
    "window",
    "rope_base",
    "rope_scaling",
    "n_rot",
    "head_dim",
    "n_head_kv",
    "v_is_k",
    "dense",
    "kv_shared",
)  # hyper-parameters that may differ between layers


def check_model(model) -> None:
    """Raise ValueError if the forward pass does not support the model completely.

    Raises
    ------
    ValueError
        If the architecture, its rope scaling or one of its tensors is unknown here, a tensor is missing, or tensors
        are not those that the metadata promises.
    """
    hparams = model.hparams
    record = find(hparams.arch)
    if record is None:
        raise ValueError(
            f"{model.path}: architecture={hparams.arch}, must be one of {', '.join(architectures())}. "
            f"Evaluate it in llama.cpp."
        )
    layers = [hparams.at(i) for i in range(hparams.n_layer)]
    kinds = {layer.rope_scaling.type for layer in layers if layer.rope_scaling}
    if others := kinds - set(ROPE_SCALINGS):
        raise ValueError(
            f"{model.path}: rope scaling={others.pop()}, must be linear or yarn. Evaluate it in llama.cpp."
        )
    if not 0 <= hparams.n_kv_shared < hparams.n_layer:
        raise ValueError(
            f"{model.path}: n_kv_shared={hparams.n_kv_shared}, must be less than n_layer={hparams.n_layer}. "
            f"Convert the checkpoint again."
        )
    if hparams.n_lora_kv and hparams.attn_temp_scale:
        raise ValueError(
            f"{model.path}: attn_temp_scale={hparams.attn_temp_scale}, must be 0 with latent attention. "
            f"Evaluate it in llama.cpp."
        )
    may_vary = (*VARYING, "n_ff") if hparams.n_embd_layer else VARYING
    if fixed := [name for name in hparams.varies if name not in may_vary]:
        raise ValueError(
            f"{model.path}: {fixed[0]} differs between layers, must be one number. Evaluate it in llama.cpp."
        )
    for layer in layers if hparams.varies else layers[:1]:
        _check_heads(model, layer)
    if hparams.n_expert:
        _check_experts(model, hparams)
    for i, layer in enumerate(layers if hparams.n_kv_shared else ()):
        kept = hparams.kept(i)
        if layer.kv_shared and kept.stop - kept.start != 2 * layer.n_kv:
            raise ValueError(
                f"{model.path}: n_kv_shared={hparams.n_kv_shared}, must leave an earlier layer with keys and values "
                f"for layer {i}. Convert the checkpoint again."
            )
    _check_tensors(model, record)


def _check_heads(model, h) -> None:
    """Refuse numbers of heads that do not divide each other; `h` holds a layer's hyper-parameters."""
    if h.n_head % h.n_head_kv or h.n_rot % 2 or h.n_rot > h.head_dim:
        raise ValueError(
            f"{model.path}: n_head={h.n_head}, n_head_kv={h.n_head_kv}, head_dim={h.head_dim}, n_rot={h.n_rot} "
            f"do not fit together. Convert the checkpoint again."
        )


def _check_experts(model, h) -> None:
    """Refuse numbers of experts that do not fit together, and what no layer with experts computes."""
    n_groups = max(1, h.expert_groups)
    size, n_used = h.n_expert // n_groups, h.expert_groups_used if n_groups > 1 else 1
    fits = 0 < h.n_expert_used <= n_used * size and n_used <= n_groups and size * n_groups == h.n_expert
    if not fits or size < 2 <= n_groups:
        raise ValueError(
            f"{model.path}: n_expert={h.n_expert}, n_expert_used={h.n_expert_used}, expert_groups={h.expert_groups}, "
            f"expert_groups_used={h.expert_groups_used} do not fit together. Convert the checkpoint again."
        )
    if h.expert_gating > 2:
        raise ValueError(f"{model.path}: expert_gating={h.expert_gating}, must be 0 to 2. Evaluate it in llama.cpp.")
    if h.n_embd_layer or h.n_kv_shared:
        raise ValueError(
            f"{model.path}: n_expert={h.n_expert}, must be 0 where layers have embeddings of their own or use keys of "
            f"others. Evaluate it in llama.cpp."
        )


def _check_tensors(model, record: Architecture) -> None:
    """Refuse tensors that the forward pass does not use, that are missing, or that have another shape."""
    hparams = model.hparams
    layers = [record.layer, *(layer for _, layer in record.kinds)]
    used = {*record.matrices(), *(n for layer in layers for n in (layer.norms | layer.vectors).values())}
    used = {name.partition(".")[0] for name in used}
    for name in model.names:
        tensor = record.tensor(name)
        if layer_of(name) >= hparams.n_layer and tensor is not None:
            continue  # where it is not expected, it is refused below
        if tensor is None or tensor.is_layered and name.split(".")[2] not in used:
            raise ValueError(f"{model.path}: {name} is unknown in {hparams.arch}. Evaluate it in llama.cpp.")
    if "token_embd.weight" in model:
        hparams = replace(hparams, n_vocab=model.tensor("token_embd.weight").shape[0])  # metadata may count fewer
    expected = {name: (tensor, shape) for name, tensor, shape in record.expand(hparams)}
    needed = record.used(hparams)
    for name, (tensor, _) in expected.items():
        if name not in model and (not tensor.optional or name in needed):
            raise ValueError(f"{model.path}: {name} is missing. Convert the checkpoint again.")
    for tensor in model:
        shape = expected[tensor.name][1] if tensor.name in expected else None
        if shape is None or squeezed(tensor.shape) != squeezed(shape):
            shape = shape or record.tensor(tensor.name).shape_in(hparams.at(0))  # pyright: ignore[reportOptionalMemberAccess]
            raise ValueError(
                f"{model.path}: {tensor.name}: shape={tensor.shape}, the metadata gives {shape} in each of "
                f"{hparams.n_layer} layers. Convert the checkpoint again."
            )
