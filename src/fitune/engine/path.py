"""The fast path as the loop sees it: a batch goes in, a loss sum comes out, gradients are added.

All rows of a batch stand one after another without padding. On a GPU a micro-step is three CUDA graphs over static
buffers: blocks forward, one head chunk (replayed as often as there are chunks with supervised rows), blocks backward;
they are captured once per static size. On CPU the same functions run directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fitune.data.batches import IGNORE, Batch
from fitune.engine.block import Block, Tokens, epsilon
from fitune.engine.buffers import Buffers
from fitune.engine.head import Head
from fitune.engine.offload import SentRows
from fitune.engine.products import Scratch
from fitune.engine.spec import Unsupported, adapter_dropout, base_of, block_shape, block_spec, rotary_tables
from fitune.kernels.attention import Documents
from fitune.kernels.dropout import Dropout
from fitune.kernels.norm import Norm
from fitune.kernels.refresh import Refresh
from fitune.kernels.rope import Rotary
from fitune.model.host_embedding import host_embedding
from fitune.plan.saves import Level, bucket

cuda: Any = torch.cuda  # only partly typed
FIELDS = ("ids", "positions", "start", "end", "index", "targets")  # what travels to the device, one row each


class EnginePath:
    """Forward and backward of micro-batches through the engine's block (see `training.path.Path`).

    Args:
        model: a transformers model of a family in `engine.spec.SPECS`, wrapped by PEFT with LoRA, on its device.
        level: what is kept for the backward pass.
        max_tokens: of the largest micro-step; a larger one makes the buffers grow.
        max_position: longest row.

    Raises:
        Unsupported: the model or method is not for the engine.
    """

    def __init__(self, model: nn.Module, model_type: str, level: Level, max_tokens: int, max_position: int) -> None:
        spec = block_spec(model, model_type)
        base = base_of(model)
        self._embedding_VH = base.get_input_embeddings().weight.detach()
        self.device, self.dtype = next(model.parameters()).device, self._embedding_VH.dtype
        self.level = level
        self._hosted_VH = host_embedding(base) if level == "offload" and self.device.type == "cuda" else None
        if self._hosted_VH is not None:
            self._embedding_VH = self._hosted_VH
        self._scratch = Scratch(self.dtype, self.device)
        self.blocks = [Block(layer, spec, level, self.dtype, self._scratch) for layer in base.model.layers]
        columns = tuple(map(max, zip(*(block.lora for block in self.blocks), strict=True)))
        self.shape = block_shape(model, spec, (columns[0], columns[1], columns[2], columns[3]))
        fp8 = {group.quantization == "fp8" for block in self.blocks for group in block.groups.values()}
        if len(fp8) > 1:
            raise Unsupported("some projections in fp8 and some not")
        probability = adapter_dropout(model)
        self.shape = replace(self.shape, fp8=fp8 == {True}, dropout=probability > 0)
        self.dropout = Dropout(probability, self.device) if probability else None
        own = {id(p) for block in self.blocks for group in block.groups.values() for p in group.parameters()}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) not in own:
                raise Unsupported(f"trains {name}, which is in no block")
        # The lowest block that trains: below it nothing is kept and no gradient computed.
        self.lowest = min(i for i, block in enumerate(self.blocks) if block.trains)
        for number, block in enumerate(self.blocks):
            block.shape = self.shape
            if self.dropout:
                block.use_dropout(self.dropout, number)
        self.blocks[self.lowest].first = True
        final = base.model.norm
        self._head = Head(Norm(final.weight.detach(), None, epsilon(final)), base.get_output_embeddings())
        cos, sin = rotary_tables(model, max_position, self.dtype)
        self._rotary = Rotary(cos, sin, self.shape.head_dim, spec.interleaved)
        self._scale = torch.ones((), device=self.device)
        self._loss_sum = torch.zeros((), device=self.device)
        self._join_adapters()
        self._graphs: dict[int, dict[str, Any]] = {}
        self._pool: Any = None
        # One stream for warming up and capturing: the library workspaces of a stream are 32 MiB and more.
        self._stream: Any = cuda.Stream() if self.device.type == "cuda" else None
        self.reserve(max_tokens)

    def loss(self, batch: Batch) -> torch.Tensor:
        """See `training.path.Path.loss`."""
        return self._run(batch, None)

    def loss_and_grad(self, batch: Batch, scale: float) -> torch.Tensor:
        """See `training.path.Path.loss_and_grad`."""
        return self._run(batch, scale)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return int(self._embedding_VH.shape[0])

    @contextmanager
    def own_stream(self) -> Iterator[None]:
        """Run what stands inside on the stream that graphs are captured on."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(cuda.current_stream())
        with cuda.stream(self._stream):
            yield
        cuda.current_stream().wait_stream(self._stream)

    def run_block(
        self, number: int, batch: Batch, x_TH: torch.Tensor, gradient_TH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One block alone, forward and backward, without graphs and dropout: for the self-check.

        Returns:
            The block's output (T, H), and the gradient of its input (None where nothing below is trained). The
            adapters' gradients are added as by `loss_and_grad`.
        """
        rows, tokens = flatten(batch)
        self._claim_gradients()
        self._seed(training=False)
        with torch.no_grad():
            self._load(rows, tokens, tokens)
            self._refresh.run()
            self._documents[:, :tokens].copy_(self._inputs[2:4, :tokens])
            views, where, block = self._views(number, tokens), self._tokens(tokens), self.blocks[number]
            views["x"].copy_(x_TH)
            block.forward(views, where, None)
            out = views["mid"] + views["branch"]
            d_TH = self._spare("d", tokens)[:tokens]
            d_TH.copy_(gradient_TH)
            block.backward(views, where)
            return out, None if block.first else d_TH.clone()

    @property
    def vectors(self) -> tuple[torch.Tensor, torch.Tensor, list[nn.Parameter]]:
        """All adapters' values as one fp32 vector, their gradients as another, and the parameters in that order."""
        return self._values, self._gradients, [parameter for parameter, _ in self._parameters]

    def _join_adapters(self) -> None:
        """Move all trained adapters into one vector; their gradients are another, parameters' .grad views of it."""
        groups = [group for block in self.blocks for group in block.groups.values()]
        parameters = [parameter for group in groups for parameter in group.parameters()]
        self._values = torch.cat([parameter.detach().float().flatten() for parameter in parameters])
        self._gradients = torch.zeros_like(self._values)
        self._parameters: list[tuple[nn.Parameter, torch.Tensor]] = []
        at = 0
        for group in groups:
            group.use_gradients(self._gradients[at:])
            for parameter in group.parameters():
                part = slice(at, at + parameter.numel())
                parameter.data = self._values[part].view(parameter.shape)
                self._parameters.append((parameter, self._gradients[part].view(parameter.shape)))
                at = part.stop
        self._places = [parameter.data_ptr() for parameter in parameters]
        self._refresh = Refresh([copy for group in groups for copy in group.copies()])

    def _claim_gradients(self) -> None:
        """The optimizer drops gradients between steps; ours are static, so they are zeroed and given back."""
        if [parameter.data_ptr() for parameter, _ in self._parameters] != self._places:
            raise RuntimeError("adapter parameters were moved after the engine was made; make a new EnginePath")
        fresh = [(parameter, view) for parameter, view in self._parameters if parameter.grad is None]
        if len(fresh) == len(self._parameters):
            self._gradients.zero_()
        else:
            for _, view in fresh:
                view.zero_()
        for parameter, view in fresh:
            parameter.grad = view

    def reserve(self, tokens: int) -> None:
        """Make buffers for micro-steps of up to `tokens` tokens; a larger one makes them grow later."""
        self._graphs.clear()
        self._pool = None
        self._buffers: Buffers | None = None  # freed before the larger ones are made
        if self.device.type == "cuda":
            cuda.empty_cache()  # fusing weights and the self-check left holes of other sizes
        capacity = bucket(tokens, tokens) if self.device.type == "cuda" else tokens
        kept = len(self.blocks) - self.lowest
        self._buffers = Buffers(self.shape, self.level, kept, capacity, self.dtype, self.device)
        if self.shape.fp8:
            self._scratch.codes, self._scratch.scales = self._buffers.rows_of_codes()
        self._documents = torch.zeros(2, capacity, dtype=torch.int32, device=self.device)
        padded = -(-capacity // self._head.rows) * self._head.rows
        self._inputs = torch.zeros(len(FIELDS), max(capacity, padded), dtype=torch.int64, device=self.device)
        self._staging = _Staging(self._inputs)
        self._sent_rows = None if self._hosted_VH is None else SentRows(self._hosted_VH, capacity)

    def _run(self, batch: Batch, scale: float | None) -> torch.Tensor:
        rows, tokens = flatten(batch)
        assert self._buffers is not None
        if tokens > self._buffers.capacity:
            self.reserve(tokens)
        if scale is not None:
            self._claim_gradients()
            self._scale.fill_(scale)
        self._seed(scale is not None)
        self._loss_sum.zero_()
        with torch.no_grad():
            if self.device.type == "cuda":
                self._replay(rows, tokens, scale is not None)
            else:
                self._direct(rows, tokens, scale is not None)
        return self._loss_sum.clone()

    def _seed(self, training: bool) -> None:
        """New masks for a micro-step, by the CPU's generator, which the loop seeds; none where nothing is learned."""
        if self.dropout is None:
            return
        if training:
            self.dropout.draw(int(torch.randint(2**63 - 1, (), device="cpu")))
        else:
            self.dropout.off()

    def _direct(self, rows: dict[str, torch.Tensor], tokens: int, backward: bool) -> None:
        """One micro-step at its own size."""
        self._load(rows, tokens, tokens)
        self._forward(tokens)
        if backward:
            self._spare("d", tokens).zero_()
        count = rows["index"].numel()
        for at in range(0, count, self._head.rows):
            stop = min(at + self._head.rows, count)
            self._head_chunk(tokens, self._inputs[4, at:stop], self._inputs[5, at:stop], backward)
        if backward:
            self._backward(tokens)

    def _load(self, rows: dict[str, torch.Tensor], tokens: int, size: int) -> None:
        """Copy a micro-step's integers to the device, padded to its static size; with them hosted embeddings."""
        ids = self._staging.send(rows, tokens, size, self._head.rows)
        if self._sent_rows is not None:
            self._sent_rows.send(ids, self._views(0, size)["x"])

    def _tokens(self, tokens: int) -> Tokens:
        documents = Documents(self._documents[0, :tokens], self._documents[1, :tokens])
        return Tokens(self._inputs[1, :tokens], documents, self._rotary)

    def _views(self, layer: int, tokens: int) -> dict[str, torch.Tensor]:
        assert self._buffers is not None
        return self._buffers.block(max(0, layer - self.lowest), tokens)

    def _spare(self, name: str, tokens: int) -> torch.Tensor:
        assert self._buffers is not None
        return self._buffers.with_spare_row(name, tokens)[:, : self.shape.hidden]

    def _forward(self, tokens: int) -> None:
        """Token ids to the output of the last block, in `branch`."""
        self._refresh.run()
        self._documents[:, :tokens].copy_(self._inputs[2:4, :tokens])
        assert self._buffers is not None
        offload, where = self._buffers.offload, self._tokens(tokens)
        residual = None
        for layer, block in enumerate(self.blocks):
            views = self._views(layer, tokens)
            kept = layer - self.lowest
            if offload and kept >= 0:
                offload.before_write(kept)
            if layer == 0 and self._hosted_VH is None:
                torch.index_select(self._embedding_VH, 0, self._inputs[0, :tokens], out=views["x"])
            block.forward(views, where, residual)
            residual = views["mid"]
            if offload and kept >= 0:
                offload.store(kept, tokens)
        assert residual is not None
        if offload:
            offload.join()
        torch.add(residual, views["branch"], out=views["branch"])

    def _head_chunk(self, tokens: int, index: torch.Tensor, targets: torch.Tensor, backward: bool) -> None:
        gradient = (self._scale, self._spare("d", tokens)) if backward else None
        self._head.chunk(self._spare("branch", tokens), index, targets, self._loss_sum, gradient)

    def _backward(self, tokens: int) -> None:
        """Gradient of the last block's output, in `d`, to the gradients of all adapters."""
        assert self._buffers is not None
        offload, where = self._buffers.offload, self._tokens(tokens)
        for layer in range(len(self.blocks) - 1, self.lowest - 1, -1):
            if offload:
                offload.before_read(layer - self.lowest)
            self.blocks[layer].backward(self._views(layer, tokens), where)
            if offload:
                offload.fetch_below(layer - self.lowest, tokens)
        if offload:
            offload.join()

    def _replay(self, rows: dict[str, torch.Tensor], tokens: int, backward: bool) -> None:
        """One micro-step at the next static size, through captured graphs."""
        assert self._buffers is not None
        size = bucket(tokens, self._buffers.capacity)
        self._load(rows, tokens, size)
        graphs = self._graphs.get(size)
        if graphs is None:
            graphs = self._graphs[size] = self._capture(size)
            self._load(rows, tokens, size)
            self._loss_sum.zero_()
        graphs["forward"].replay()
        for _ in range(-(-rows["index"].numel() // self._head.rows)):
            graphs["head" if backward else "loss"].replay()
        if backward:
            graphs["backward"].replay()

    def _capture(self, size: int) -> dict[str, Any]:
        """Graphs of one static size. A first direct run compiles kernels and makes library handles."""
        chunk = torch.zeros(1, dtype=torch.int64, device=self.device)
        index_CM, targets_CM = (self._inputs[row].view(-1, self._head.rows) for row in (4, 5))

        def forward() -> None:
            chunk.zero_()
            self._spare("d", size).zero_()
            self._forward(size)

        def head(backward: bool) -> Callable[[], None]:
            def run() -> None:
                index = torch.index_select(index_CM, 0, chunk).view(-1)
                targets = torch.index_select(targets_CM, 0, chunk).view(-1)
                self._head_chunk(size, index, targets, backward)
                chunk.add_(1)

            return run

        def backward() -> None:
            self._backward(size)

        steps = {"forward": forward, "loss": head(False), "head": head(True), "backward": backward}
        kept = self._gradients.clone()
        with self.own_stream():
            for run in steps.values():
                chunk.zero_()
                run()
        self._gradients.copy_(kept)
        graphs: dict[str, Any] = {"chunk": chunk}
        for name, run in steps.items():
            graphs[name] = cuda.CUDAGraph()
            with cuda.graph(graphs[name], pool=self._pool, stream=self._stream):
                run()
            self._pool = graphs[name].pool()  # replays never overlap, so all graphs share their temporaries
        return graphs


class _Staging:
    """Page-locked copies of a micro-step's integers, a few in turn, so that the host never waits for the device."""

    def __init__(self, inputs: torch.Tensor, slots: int = 4) -> None:
        self._inputs = inputs
        self._cuda = inputs.is_cuda
        self._slots = [torch.zeros(inputs.shape, dtype=inputs.dtype, pin_memory=self._cuda) for _ in range(slots)]
        self._sent: list[Any] = [None] * slots
        self._next = 0

    def send(self, rows: dict[str, torch.Tensor], tokens: int, size: int, chunk: int) -> torch.Tensor:
        """Pad and copy: padding tokens form one last document; padding positions of the head are the spare row.

        Returns:
            The token ids (size,) on the host.
        """
        slot, self._next = self._next, (self._next + 1) % len(self._slots)
        if self._sent[slot] is not None:
            self._sent[slot].synchronize()
        staged = self._slots[slot]
        for row, name in enumerate(FIELDS[:4]):
            staged[row, :tokens] = rows[name]
        staged[0, tokens:size] = 0
        staged[1, tokens:size] = 0
        staged[2, tokens:size], staged[3, tokens:size] = tokens, size
        count = rows["index"].numel()
        padded = -(-count // chunk) * chunk if self._cuda else count
        staged[4, :count], staged[4, count:padded] = rows["index"], size
        staged[5, :count], staged[5, count:padded] = rows["targets"], IGNORE
        self._inputs.copy_(staged, non_blocking=self._cuda)
        if self._cuda:
            self._sent[slot] = cuda.Event()
            self._sent[slot].record()
        return staged[0, :size]


def flatten(batch: Batch) -> tuple[dict[str, torch.Tensor], int]:
    """The real tokens of a padded or packed batch one after another, on the host.

    Returns:
        `ids`, `positions`, `start`, `end` (T): token ids, positions, first token of the token's document and the one
        past its last; `index`, `targets` (N): positions whose next token is supervised, and that token. And T.
    """
    ids, labels, positions = batch.input_ids_BT, batch.labels_BT, batch.position_ids_BT
    if batch.attention_mask_BT is not None:
        real = batch.attention_mask_BT.bool()
        ids, labels, positions = ids[real], labels[real], positions[real]
    ids, labels, positions = ids.reshape(-1), labels.reshape(-1), positions.reshape(-1)
    tokens = ids.numel()
    starts = (positions == 0).nonzero().view(-1)
    lengths = torch.diff(starts, append=torch.tensor([tokens]))
    (index,) = (labels[1:] != IGNORE).nonzero(as_tuple=True)
    rows = {
        "ids": ids,
        "positions": positions,
        "start": starts.repeat_interleave(lengths),
        "end": (starts + lengths).repeat_interleave(lengths),
        "index": index,
        "targets": labels[index + 1],
    }
    return rows, tokens
