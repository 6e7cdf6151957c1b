"""Copies between the machine's memory and the card's, overlapped with computation on CUDA.

There, three streams of work run at once: weights and hidden states on their way in, the computation, hidden states on
their way out. Elsewhere everything happens in turn.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from math import prod

import numpy as np
import torch

from quantlab import quants
from quantlab.evaluate.engine import Stored

PIECE = 1 << 24  # weights that travel at a time: 64 MiB of float32
IN_FLIGHT = 2  # pieces of hidden states that may be on their way at a time


class Transfers:
    """Transfers of weights and hidden states to a device and back.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device):
        self.device, self.is_cuda = device, device.type == "cuda"
        self._running: deque = deque()
        self._pinned: list[np.ndarray] = []
        if self.is_cuda:
            self._loading, self._incoming, self._outgoing = (torch.cuda.Stream(device) for _ in range(3))
            self._staging = [torch.empty(PIECE, dtype=torch.float32, pin_memory=True) for _ in range(2)]
            self._free = [torch.cuda.Event() for _ in self._staging]

    def close(self) -> None:
        """Release the pinned memory."""
        self.wait()
        for array in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(array.ctypes.data)  # pyright: ignore[reportOptionalMemberAccess]
        self._pinned.clear()

    # ---- weights, by the thread that loads

    def loading(self):
        """Return the context for making weights."""
        return torch.cuda.stream(self._loading) if self.is_cuda else nullcontext()

    def loaded(self, tensors: Iterator[torch.Tensor]) -> None:
        """Wait until weights are ready, and let the computation use them."""
        if self.is_cuda:
            for tensor in tensors:
                tensor.record_stream(torch.cuda.default_stream(self.device))
            self._loading.synchronize()

    def floats(self, stored: Stored) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield slices of rows and their float32 values on the device, valid until the next one."""
        n, n_in = prod(stored.shape[:-1]), stored.shape[-1]
        flat = Stored(stored.data.reshape(n, -1), stored.qtype, (n, n_in))
        step = max(1, PIECE // n_in)
        for i, start in enumerate(range(0, n, step)):
            some = slice(start, min(start + step, n))
            yield some, self._bring(flat, some, (some.stop - start, n_in), i % 2)

    def _bring(self, stored: Stored, some: slice, shape: tuple[int, int], turn: int) -> torch.Tensor:
        """Return some rows on the device."""
        size = prod(shape)
        if not self.is_cuda or size > PIECE:  # more than is pinned
            return torch.from_numpy(np.array(stored.floats(some))).to(self.device)
        self._free[turn].synchronize()
        staging, data = self._staging[turn][:size].view(shape), stored.data[some]
        if data.dtype == np.float32:
            np.copyto(staging.numpy(), data)
        else:
            quants.dequantize(data.view(np.uint8), stored.qtype, shape, out=staging.numpy())
        found = staging.to(self.device, non_blocking=True)
        self._free[turn].record()
        return found

    # ---- hidden states

    def pinned(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return an array in pinned memory, for direct copies by the card."""
        array = np.empty(shape, np.float32)
        if not self.is_cuda:
            return array
        if int(torch.cuda.cudart().cudaHostRegister(array.ctypes.data, array.nbytes, 0)) == 0:  # pyright: ignore[reportOptionalMemberAccess]
            self._pinned.append(array)
            return array
        with suppress(RuntimeError):  # where it may not be pinned, copies wait for each other; the next kernel reports
            torch.ones(1, device=self.device).add_(1)  # that failure, which must not be one of the computation
        return array

    def fetch(self, states) -> torch.Tensor:
        """Return hidden states on the device, without copying those already there."""
        if isinstance(states, torch.Tensor):
            return states
        host = torch.from_numpy(states)
        if not self.is_cuda:
            return host.to(self.device)
        while len(self._running) >= IN_FLIGHT:
            self._running.popleft().synchronize()
        with torch.cuda.stream(self._incoming):
            x = host.to(self.device, non_blocking=bool(self._pinned))
        torch.cuda.current_stream().wait_stream(self._incoming)
        x.record_stream(torch.cuda.current_stream())
        return x

    def store(self, x: torch.Tensor, states) -> None:
        """Store hidden states, immediately unless their memory is pinned."""
        host = states if isinstance(states, torch.Tensor) else torch.from_numpy(states)
        if host.data_ptr() == x.data_ptr():  # changed in place
            return
        if isinstance(states, torch.Tensor):
            states.copy_(x)
            return
        if not self.is_cuda or not self._pinned:
            host.copy_(x)
            return
        self._outgoing.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._outgoing):
            host.copy_(x, non_blocking=host.is_contiguous())
            x.record_stream(self._outgoing)
            self._running.append(self._outgoing.record_event())

    def wait(self) -> None:
        """Wait until everything is stored."""
        while self._running:
            self._running.popleft().synchronize()
