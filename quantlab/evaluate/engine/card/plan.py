"""The plan of a pass that fits into a card's memory and the machine's.

The card holds two layers (one is computed, one is on its way), what a layer makes of a few chunks, and the hidden
states of all variants where there is room; else those are in the machine's memory, or on disk.
"""

from collections import Counter
from collections.abc import Sequence
from math import prod

import numba
import torch

from quantlab import arch
from quantlab.evaluate import budget
from quantlab.evaluate.budget import Budget, allowed_bytes
from quantlab.evaluate.engine.card.layers import SCORE_BYTES
from quantlab.evaluate.engine.card.products import Products, measure
from quantlab.evaluate.engine.card.scores import ARRAYS
from quantlab.evaluate.engine.card.transfers import IN_FLIGHT, PIECE
from quantlab.evaluate.variants import Variant, identity
from quantlab.transform.plan import parse_bytes, tensor_bytes

ROWS = {"cuda": 16384, "mps": 4096, "cpu": 4096}  # tokens that a layer is applied to at a time, where memory allows
LEAST_ROWS = 2048  # fewer only where nothing else fits: products of fewer rows are slow
LOGITS = {"cuda": 1 << 31, "mps": 1 << 29, "cpu": 1 << 28}  # bytes of logits and what is made of them, at a time
SHARE_OF_FREE = 0.92  # of a card's memory; the rest is lost between what is allocated
SHARE_OF_PEAK = {"float32": 0.8, "halves": 0.75, "half": 0.6}  # of the speed of a large product that a pass reaches
ENCODE_SPEED = 80e6  # weights per second and thread, k-quants
DISK_SPEED = 1.5e9  # bytes per second of an SSD, taken for hidden states that are on disk
PACKAGE = {"cuda": 2 << 30, "mps": 1 << 30, "cpu": 200 << 20}  # bytes of the machine that torch and its driver take


def chunks_at_most(device: torch.device, n_ctx: int) -> int:
    """Return the largest useful number of chunks for applying a layer."""
    return max(1, ROWS[device.type] // n_ctx)


def rows_of_logits(n_vocab: int, device: torch.device) -> int:
    """Return the positions that are scored at a time."""
    return max(1, LOGITS[device.type] // (4 * ARRAYS * n_vocab))


def fit(
    engine, variants: Sequence[Variant], windows, memory: str | int | None, keep_states: bool, observed: bool = False
) -> Budget:
    """Cut a pass of a `CardEngine`; see `Engine.plan`.

    Raises
    ------
    ValueError
        If it does not fit however it is cut.
    """
    needs, n_chunks = _Needs(engine, variants, windows, observed), len(windows.tokens)
    host, card = allowed_bytes(memory), card_bytes(engine)
    most = min(n_chunks, chunks_at_most(engine.device, engine.n_ctx))
    places = ["disk"] if keep_states else ["card", "memory", "disk"]
    if engine.device.type == "cpu" and not keep_states:
        places = ["memory", "disk"]
    found = None
    for least in (min(most, -(-LEAST_ROWS // engine.n_ctx)), 1):
        for place in places:
            chunks, outputs = most, max(1, len(variants) - 1)
            while not (fits := needs.fit(place, chunks, outputs, host, card)) and (chunks > least or outputs > 1):
                chunks, outputs = max(least, chunks // 2), max(1, outputs // 2)
            if fits and found is None:
                found = place, chunks, outputs
    if found is None:
        raise ValueError(needs.refusal(places[-1], memory, host, card))
    place, chunks, outputs = found
    on_host, on_card = needs.bytes(place, chunks, outputs)
    disk, n_layer = 2 * needs.states * (place == "disk"), engine.hparams.n_layer
    on_disk = f"on disk ({disk / 2**30:.2f} GiB, read and written {n_layer} times)"
    where = {"card": "on the card", "memory": "in memory", "disk": on_disk}
    said = f"{engine.name}, {engine.precision}: " + (f"{on_card / 2**30:.2f} GiB on the card, " if card else "")
    return Budget(
        chunks, outputs, place != "disk", on_host, disk, needs.seconds() + n_layer * disk / DISK_SPEED,
        states_on_device=place == "card", device_memory=on_card,
        said=(said, f"; hidden states {where[place]}, weights read once"),
    )  # fmt: skip


def card_bytes(engine) -> int:
    """Return the usable bytes of the card (0: it shares the machine's memory)."""
    if engine.device.type == "cpu":
        return 0
    if engine.device_memory is not None:
        return int(parse_bytes(engine.device_memory) * SHARE_OF_FREE)
    if engine.device.type == "mps":
        return int(torch.mps.recommended_max_memory() * SHARE_OF_FREE)
    return int(torch.cuda.mem_get_info()[0] * SHARE_OF_FREE)


def token_bytes(
    does: arch.Layer, h: arch.Hparams, products: Products, n_ctx: int, beside: int | None = None, observed: bool = False
) -> int:
    """Return the bytes that the worst step of a layer takes for a chunk, weights and kept scores of attention aside.

    `beside` are columns that are there for the whole layer where states hold more than the stream (0: they count as
    hidden states); `observed` adds what only observers see.
    """
    x, q, kv = 4 * h.n_embd, h.n_head * h.head_dim, h.n_head_kv * h.head_dim  # x: bytes of a row of the stream
    of_all = h.n_ff_shexp if does.router and h.n_ff_shexp else h.n_ff
    n_ff = of_all if does.ffn_in else 0
    operand, making, adding = {"float32": (0, 0, 0), "half": (2, 2, 0), "halves": (4, 8, 4)}[products.precision]
    width = 2 if products.precision == "half" else 4  # of what attention sees
    repeated = 2 * q if kv < q else 0  # k and v for every head
    gate = 8 * q * (does.query_width - 1)  # queries and their gates, until the latter are used
    normed = [bool(name) * x + operand * h.n_embd for name in (does.attn_norm, does.ffn_norm)]
    apart = x if does.experts_norm else 0  # what experts see, where that is not what the others see
    routes = apart + 12 * h.n_expert_used if does.router else 0
    widths, given = [does.query_width * q, kv, kv], x if beside is None else 0
    if h.kv_shared:
        widths, kv, repeated = [q], 0, 2 * q
    peaks = [
        given + normed[0] + _made(widths, len(does.attn_qkv), adding),
        gate + given + 4 * (q + 2 * kv) + (4 - width) * (q + 2 * kv) + width * (repeated + q),
        routes + x + normed[1] + _made([n_ff, n_ff], len(does.ffn_in), adding),
        routes + 2 * x + 12 * n_ff,
        routes + (x if does.router else 0) + x + (4 + making) * n_ff,
    ]
    if does.router:
        share = min(1.0, 1.25 * h.n_expert_used / h.n_expert)  # of the tokens, for the expert that sees most
        inner = 4 * h.n_expert_used * h.n_ff_exp
        first = (operand or 4) * h.n_embd + (12 + adding) * h.n_ff_exp
        last = making * h.n_ff_exp + (4 + adding) * h.n_embd
        peaks.append(routes + 2 * apart + x + normed[1] + inner + int(share * max(first, last)))
    if does.latent_k:
        peaks[:2] = _latent_peaks(does, h, x, normed[0], operand, making, adding, width, observed)
    if does.layer_gate:
        own = h.n_embd_layer
        peaks.append(x + max(8, 4 + adding) * own + operand * h.n_embd)
        peaks.append(x + 4 * own + max(making * own, operand * own + (4 + adding) * h.n_embd))
    if does.conv:
        width_all, states = h.conv_width + h.ssm_inner + 2 * h.ssm_heads, h.ssm_heads * h.ssm_state * h.ssm_value
        peaks[1] = x + 4 * (width_all + h.conv_width + 2 * h.ssm_heads * h.ssm_state + 2 * h.ssm_inner)
        peaks[1] += 4 * 2 * states // n_ctx  # a matrix for each head of a chunk, and what is added to it
    return n_ctx * (4 * (beside or 0) + max(peaks))


def _latent_peaks(does: arch.Layer, h: arch.Hparams, x, normed, operand, making, adding, width, observed) -> list[int]:
    """Return the bytes of a row in the steps of latent attention; the parameters are those of `token_bytes`."""
    short, q, kv, latent = h.n_lora_q, h.n_q_mla, h.head_dim, h.n_lora_kv
    peaks, held = [x + normed + _made([short or q, kv], 2, adding)], x + 4 * (q + kv)
    if short:
        product = max(making * short, operand * short + (4 + adding) * q)
        peaks.append(x + 4 * (kv + short) + max(4 * short, product))
    if observed:
        peaks.append(held + 4 * h.n_head * h.n_nope)
    held += 2 * kv if width == 2 else 0
    mixed = width * h.n_head * latent if observed else 0
    mixing, values = held + (mixed or 4 * h.n_v), held + mixed + 4 * h.n_v + (0 if observed else width * latent)
    return [
        *peaks,
        mixing + 4 * (latent + kv),
        mixing + (4 + 2 * (width == 2)) * kv + width * kv,
        mixing + width * (kv + latent),
        values + max(making * latent, operand * latent + (4 + adding) * h.head_dim_v),
        x + 4 * h.n_v + max(making * h.n_v, operand * h.n_v + (4 + adding) * h.n_embd),
    ]


def _made(widths: list[int], matrices: int, adding: int) -> int:
    """Return the bytes of a row's products with matrices (one: side by side), as the last term is added."""
    widths = [sum(widths)] if matrices == 1 else widths[:matrices]
    return max(4 * sum(widths[: i + 1]) + adding * width for i, width in enumerate(widths or [0]))


def score_bytes(does: arch.Layer, h: arch.Hparams, n_ctx: int, chunks: int) -> int:
    """Return the bytes of scores of attention where they are kept: capped, or with a sink."""
    if does.conv or not (h.attn_softcap or does.sinks):
        return 0
    one = 4 * h.n_head * n_ctx**2
    return (3 if h.attn_softcap else 2) * one * min(chunks, max(1, SCORE_BYTES // one))


class _Needs:
    """The memory that a pass needs in the machine and on the card."""

    def __init__(self, engine, variants: Sequence[Variant], windows, observed: bool = False):
        self.engine, self.variants, self.windows, self.hparams = engine, variants, windows, engine.hparams
        self.states, self.observed = 4 * windows.tokens.size * self.hparams.n_state * len(variants), observed
        self.embeddings = budget.embedding_bytes(self.hparams, windows)
        self.is_cpu = engine.device.type == "cpu"
        by_layer = Counter()
        for tensor in variants[0].model:
            kind, index, *_ = tensor.name.split(".")
            if kind == "blk" and int(index) < self.hparams.n_layer:  # those after guess ahead
                by_layer[int(index)] += tensor.n_weights
        (self.widest, self.weights), *_ = by_layer.most_common(1)
        self.shapes = budget.layer_shapes(variants[0].model, self.widest)

    def bytes(self, place: str, chunks: int, outputs: int) -> tuple[int, int]:
        """Return the bytes of the machine and of the card."""
        held = {"card": (0, self.states), "memory": (self.states, 0), "disk": (0, 0)}[place]
        layer, output = self._layer(place, chunks), self._output(outputs)
        stored, matrices = self._stored(), self._stored_output(outputs)
        if self.is_cpu:
            steps = self.embeddings, layer + stored, output + matrices
            return budget.PROCESS + PACKAGE["cpu"] + held[0] + max(steps), 0
        most = max(self.embeddings, stored, matrices)
        host = budget.PROCESS + PACKAGE[self.engine.device.type] + held[0] + most + 2 * 4 * PIECE
        return host, held[1] + max(layer, output, self.embeddings if place == "card" else 0)

    def fit(self, place: str, chunks: int, outputs: int, host: int, card: int) -> bool:
        """Tell whether both suffice."""
        on_host, on_card = self.bytes(place, chunks, outputs)
        return on_host <= host and on_card <= card

    def refusal(self, place: str, memory, host: int, card: int) -> str:
        """Describe the least memory for the pass."""
        on_host, on_card = self.bytes(place, 1, 1)
        name, given, needed = "memory", memory or host, on_host
        if on_card > card:
            name, given, needed = "device_memory", self.engine.device_memory or card, on_card / SHARE_OF_FREE
        return (
            f"{name}={given}, must be at least {needed / 2**30:.2f} GiB for this model. "
            f"Give more, or a smaller n_ctx{'' if self.is_cpu else ', or device=cpu'}."
        )

    def _layer(self, place: str, chunks: int) -> int:
        """Return the bytes on the device during layers, without hidden states of other chunks."""
        products, n_ctx = self.engine.products, self.engine.n_ctx
        record = arch.known(self.hparams.arch)
        kinds = {(record.layer_at(self.hparams, i), self.hparams.at(i)) for i in range(self.hparams.n_layer)}
        n_state, is_view = self.hparams.n_state, place == "card" or place == "memory" and self.is_cpu
        beside = None if n_state == self.hparams.n_embd else 0 if is_view else n_state
        of = products, n_ctx, beside, self.observed
        rows = max(chunks * token_bytes(*kind, *of) + score_bytes(*kind, n_ctx, chunks) for kind in kinds)
        moving = 4 * n_state * (2 * IN_FLIGHT if place == "memory" and not self.is_cpu else 0)
        layers = (1 + self.engine.ahead) * products.weight_bytes * self.weights
        return layers + rows + chunks * n_ctx * moving + self._making()

    def _making(self) -> int:
        """Return the bytes of a piece of a matrix in transfer (widened halves: of a whole one)."""
        products = self.engine.products
        piece = min(PIECE, max(prod(shape) for shape in self.shapes.values()))
        widened = 0 if products.is_native or products.precision == "float32" else max(map(prod, self.shapes.values()))
        return 4 * (piece * (1 + 2 * (products.n_parts - 1)) + widened)

    def _output(self, outputs: int) -> int:
        """Return the bytes on the device during scoring."""
        h, products = self.hparams, self.engine.products
        matrix = h.n_vocab * h.n_embd
        rows = min(rows_of_logits(h.n_vocab, self.engine.device), self.windows.targets.shape[1])
        logits = 4 * rows * (ARRAYS * h.n_vocab + 3 * h.n_embd)
        return (1 + outputs) * products.weight_bytes * matrix + logits + 4 * min(PIECE, matrix) * products.n_parts

    def _stored(self) -> int:
        """Return the bytes of the widest layer's stored tensors, read and quantized for several variants."""
        base, wanted = self.variants[0].model, Counter()
        for variant in self.variants:
            for name in self.shapes:
                wanted[identity(variant, name), variant.types[name]] += 1
        shared, single = 0, 0
        for ((_, name, qtype, _), _), count in wanted.items():
            size = tensor_bytes(self.shapes[name], qtype)
            shared += size if count > 1 and qtype != base.tensor(name).qtype else 0
            single = max(single, size)
        return shared + single + sum(tensor_bytes(shape, base.tensor(n).qtype) for n, shape in self.shapes.items())

    def _stored_output(self, outputs: int) -> int:
        """Return the bytes of stored output matrices."""
        return (1 + outputs) * 2 * self.hparams.n_vocab * self.hparams.n_embd

    def seconds(self) -> float:
        """Estimate the time, the longer of computing and quantizing."""
        speed = SHARE_OF_PEAK[self.engine.precision] * measure(self.engine.precision, self.engine.device)
        computing, weights = budget.work_of(self.variants, self.windows)
        times = computing / speed, weights / (ENCODE_SPEED * numba.get_num_threads())
        return sum(times) if self.is_cpu else max(times)
