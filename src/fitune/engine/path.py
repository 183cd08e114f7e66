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

from fitune.data.batches import Batch
from fitune.engine.block import Block, Tokens, Views
from fitune.engine.buffers import Buffers
from fitune.engine.groups import settle
from fitune.engine.head import Head
from fitune.engine.layout import Integers, Rows, flatten
from fitune.engine.offload import SentRows
from fitune.engine.products import Scratch
from fitune.engine.spec import (
    BlockSpec,
    Unsupported,
    adapter_dropout,
    alibi_slopes,
    base_of,
    block_shape,
    block_spec,
    frozen_norm,
    rotary_tables,
)
from fitune.engine.trained import Trained, trained_parameters
from fitune.engine.virtual import virtual_tokens
from fitune.kernels.attention import Documents
from fitune.kernels.dropout import Dropout
from fitune.kernels.norm import add_norm
from fitune.kernels.refresh import Refresh
from fitune.kernels.rope import Rotary
from fitune.kernels.sums import add_column_sums
from fitune.model.host_embedding import host_embedding
from fitune.plan.saves import BlockShape, Level, bucket, documents, integers, most_documents

cuda: Any = torch.cuda  # only partly typed


class EnginePath:
    """Forward and backward of micro-batches through the engine's block (see `training.path.Path`).

    Args:
        model: a transformers model of a family in `engine.spec.SPECS` with what a method made of it, on its device.
        level: what is kept for the backward pass.
        max_tokens: of the largest micro-step, virtual ones included; a larger one makes the buffers grow.
        max_position: longest row, without virtual tokens.

    Raises:
        Unsupported: the model or method is not for the engine.
    """

    def __init__(self, model: nn.Module, model_type: str, level: Level, max_tokens: int, max_position: int) -> None:
        spec = block_spec(model, model_type)
        base = base_of(model)
        self._embedding_VH = base.get_input_embeddings().weight.detach()
        self.device, self.dtype = next(model.parameters()).device, self._embedding_VH.dtype
        self.level = level
        self._hosted_VH = host_embedding(base, model) if level == "offload" and self.device.type == "cuda" else None
        if self._hosted_VH is not None:
            self._embedding_VH = self._hosted_VH
        self._give_back()  # or the first weights would lie in what loading left
        self._scratch = Scratch(self.dtype, self.device)
        self.layers = base.get_submodule(spec.layers)
        self.virtual = virtual_tokens(model, spec, len(self.layers), self.dtype)
        self.trained = Trained([] if self.virtual else trained_parameters(model, spec), self.device)
        self.blocks: list[Block] = []
        for layer in self.layers:
            self.blocks.append(Block(layer, spec, level, self.dtype, self._scratch, self.trained))
            self._give_back()  # the weights as they were
            if self.device.type == "cuda":
                settle(list(self.blocks[-1].groups.values()))
                self._give_back()  # and as they were put together
        self.shape = self._shape(model, spec)
        for number, block in enumerate(self.blocks):
            block.shape = self.shape
            block.prefix = self.virtual.prefix(number) if self.virtual else None
        self._set_up_ends(base, spec)
        # The lowest block that trains: below it nothing is kept and no gradient computed.
        below = self._embedding_dbias_H is not None or (self.virtual is not None and self.virtual.embedded)
        training = [number for number, block in enumerate(self.blocks) if block.trains or below]
        self.lowest = min(training, default=len(self.blocks) - 1)
        self.blocks[self.lowest].first = not below
        self._rotary = self._slopes_h = None
        if spec.positions == "alibi":
            self._slopes_h = alibi_slopes(self.shape.heads, self.device)
        else:
            tables = rotary_tables(model, spec, max_position + self.shape.virtual, self.dtype)
            self._rotary = Rotary(*tables, self.shape.head_dim, spec.interleaved, self.shape.axes, spec.fused)
        self._blank = base.blank if spec.prefix else None
        self._scale = torch.ones((), device=self.device)
        self._loss_sum = torch.zeros((), device=self.device)
        groups = [group for block in self.blocks for group in block.groups.values()]
        self._refresh = Refresh([copy for group in groups for copy in group.copies()])
        self._graphs: dict[int, dict[str, Any]] = {}
        self._pool: Any = None
        # One stream for warming up and capturing: the library workspaces of a stream are 32 MiB and more.
        self._stream: Any = cuda.Stream() if self.device.type == "cuda" else None
        self.reserve(max_tokens)

    def _shape(self, model: nn.Module, spec: BlockSpec) -> BlockShape:
        """Sizes of all blocks: as many adapter columns as any has, dropout if there is any."""
        columns = tuple(map(max, zip(*(block.lora for block in self.blocks), strict=True)))
        shape = block_shape(model, spec, (columns[0], columns[1], columns[2], columns[3]))
        fp8 = {group.quantization == "fp8" for block in self.blocks for group in block.groups.values()}
        if len(fp8) > 1:
            raise Unsupported("some projections in fp8 and some not")
        probability = adapter_dropout(model)
        self.dropout = Dropout(probability, self.device) if probability else None
        if self.dropout:
            for number, block in enumerate(self.blocks):
                block.use_dropout(self.dropout, number)
        virtual = self.virtual.count if self.virtual else 0
        scaled = max(block.scaled for block in self.blocks)
        return replace(shape, fp8=fp8 == {True}, dropout=probability > 0, virtual=virtual, scaled=scaled)

    def _set_up_ends(self, base: Any, spec: BlockSpec) -> None:
        """The norm behind the embedding, if there is one; final norm and head."""
        final = base.get_submodule(spec.final_norm)
        dbias_H = self.trained.gradient(getattr(final, "bias", None))
        self._head = Head(frozen_norm(final), base.get_output_embeddings(), dbias_H)
        self._embedding_norm = self._embedding_dbias_H = None
        if spec.embedding_norm:
            module = base.get_submodule(spec.embedding_norm)
            self._embedding_norm = frozen_norm(module)
            self._embedding_dbias_H = self.trained.gradient(module.bias)

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
            adapters' gradients are added as by `loss_and_grad`; that of virtual tokens is left in `virtual`.
        """
        rows, tokens = flatten(batch, self._blank, self.shape.virtual)
        self.trained.claim()
        self._seed(training=False)
        if self.virtual:
            self.virtual.refresh(training=False)
        with torch.no_grad():
            self._load(rows, tokens, tokens)
            self._refresh.run()
            self._integers.narrow(tokens)
            views, where, block = self._views(number, tokens), self._tokens(tokens), self.blocks[number]
            views["x"].copy_(x_TH)
            out = torch.empty_like(views["x"])
            block.output(views, block.forward(views, where, None), out)
            d_TH = self._spare("d", tokens)[:tokens]
            d_TH.copy_(gradient_TH)
            block.backward(views, where)
            below = None if block.first else d_TH.clone()
            if number == 0:
                self._take(tokens, where)
            return out, below

    @property
    def vectors(self) -> tuple[torch.Tensor, torch.Tensor, list[nn.Parameter]] | None:
        """All trained values as one vector, their gradients as another (fp32), and the parameters in that order.

        None if what is trained makes virtual tokens: then it has gradients as autograd leaves them.
        """
        if self.virtual:
            return None
        return self.trained.values, self.trained.gradients, self.trained.parameters

    def reserve(self, tokens: int) -> None:
        """Make buffers for micro-steps of up to `tokens` tokens; a larger one makes them grow later."""
        self._graphs.clear()
        self._pool = self._scratch.rows = None
        self._buffers: Buffers | None = None  # freed before the larger ones are made
        self._give_back()
        capacity = bucket(tokens, tokens) if self.device.type == "cuda" else tokens
        kept = len(self.blocks) - self.lowest
        self._buffers = Buffers(self.shape, self.level, kept, capacity, self.dtype, self.device)
        if self.shape.fp8:
            self._scratch.rows = self._buffers.rows_of_codes()
        self._integers = Integers(integers(self.shape), documents(self.shape), capacity, self._head.rows, self.device)
        self._sent_rows = None if self._hosted_VH is None else SentRows(self._hosted_VH, capacity)

    def _give_back(self) -> None:
        """Free memory that PyTorch holds but nothing uses: later buffers have other sizes."""
        if self.device.type == "cuda":
            cuda.empty_cache()

    def _run(self, batch: Batch, scale: float | None) -> torch.Tensor:
        rows, tokens = flatten(batch, self._blank, self.shape.virtual)
        assert self._buffers is not None
        if tokens > self._buffers.capacity:
            self.reserve(tokens)
        if scale is not None:
            self.trained.claim()
            self._scale.fill_(scale)
        self._seed(scale is not None)
        if self.virtual:
            self.virtual.refresh(training=scale is not None)
        self._loss_sum.zero_()
        with torch.no_grad():
            if self.device.type == "cuda":
                self._replay(rows, tokens, scale is not None)
            else:
                self._direct(rows, tokens, scale is not None)
        if self.virtual and scale is not None:
            self.virtual.hand_back()
        return self._loss_sum.clone()

    def _seed(self, training: bool) -> None:
        """New masks for a micro-step, by the CPU's generator, which the loop seeds; none where nothing is learned."""
        if self.dropout is None:
            return
        if training:
            self.dropout.draw(int(torch.randint(2**63 - 1, (), device="cpu")))
        else:
            self.dropout.off()

    def _direct(self, rows: Rows, tokens: int, backward: bool) -> None:
        """One micro-step at its own size."""
        self._load(rows, tokens, tokens)
        self._forward(tokens)
        if backward:
            self._spare("d", tokens).zero_()
        count = rows["index"].numel()
        for at in range(0, count, self._head.rows):
            stop = min(at + self._head.rows, count)
            self._head_chunk(tokens, self._integers["index"][at:stop], self._integers["targets"][at:stop], backward)
        if backward:
            self._backward(tokens)

    def _load(self, rows: Rows, tokens: int, size: int) -> None:
        """Copy a micro-step's integers to the device, padded to its static size; with them hosted embeddings."""
        ids = self._integers.send(rows, tokens, size)
        if self._sent_rows is not None:
            self._sent_rows.send(ids, self._embedded(size))

    def _tokens(self, tokens: int) -> Tokens:
        rows = Documents(*self._integers.documents[:, :tokens])
        positions = self._integers.positions(self.shape.axes, tokens)
        return Tokens(positions, rows, self._rotary, self._slopes_h, self._first(tokens))

    def _first(self, tokens: int) -> torch.Tensor | None:
        return self._integers["first"][: most_documents(self.shape, tokens)] if self.virtual else None

    def _views(self, layer: int, tokens: int) -> dict[str, torch.Tensor]:
        assert self._buffers is not None
        return self._buffers.block(max(0, layer - self.lowest), tokens)

    def _spare(self, name: str, tokens: int) -> torch.Tensor:
        assert self._buffers is not None
        return self._buffers.with_spare_row(name, tokens)[:, : self.shape.hidden]

    def _forward(self, tokens: int) -> None:
        """Token ids to the output of the last block, in `branch`."""
        self._refresh.run()
        self._integers.narrow(tokens)
        assert self._buffers is not None
        offload, where = self._buffers.offload, self._tokens(tokens)
        stream = None
        for layer, block in enumerate(self.blocks):
            views = self._views(layer, tokens)
            kept = layer - self.lowest
            if offload and kept >= 0:
                offload.before_write(kept)
            if layer == 0:
                self._embed(views, where)
            stream = block.forward(views, where, stream)
            if offload and kept >= 0:
                offload.store(kept, tokens)
        assert stream is not None
        if offload:
            offload.join()
        block.output(views, stream, views["branch"])

    def _embed(self, views: Views, where: Tokens) -> None:
        """Token ids to the input of the first block; hosted embeddings are there already."""
        tokens = len(views["x"])
        rows = self._embedded(tokens)
        if self._hosted_VH is None:
            torch.index_select(self._embedding_VH, 0, self._integers["ids"][:tokens], out=rows)
        if self._embedding_norm is not None:
            add_norm(rows, None, self._embedding_norm, None, views["x"], views["rstd1"], views["mean1"])
        if self.virtual and where.first_D is not None:
            self.virtual.place(views["x"], where.first_D)

    def _embedded(self, tokens: int) -> torch.Tensor:
        """Where the embeddings go: the input of the first block, or beside it if they are normed."""
        return self._views(0, tokens)["x" if self._embedding_norm is None else "branch"]

    def _head_chunk(self, tokens: int, index: torch.Tensor, targets: torch.Tensor, backward: bool) -> None:
        gradient = (self._scale, self._spare("d", tokens)) if backward else None
        self._head.chunk(self._spare("branch", tokens), index, targets, self._loss_sum, gradient)

    def _backward(self, tokens: int) -> None:
        """Gradient of the last block's output, in `d`, to the gradients of all trained parameters."""
        assert self._buffers is not None
        offload, where = self._buffers.offload, self._tokens(tokens)
        for layer in range(len(self.blocks) - 1, self.lowest - 1, -1):
            if offload:
                offload.before_read(layer - self.lowest)
            self.blocks[layer].backward(self._views(layer, tokens), where, again=layer < len(self.blocks) - 1)
            if offload:
                offload.fetch_below(layer - self.lowest, tokens)
        if self._embedding_dbias_H is not None:
            add_column_sums(self._spare("d", tokens)[:tokens], 1.0, self._embedding_dbias_H)
        self._take(tokens, where)
        if offload:
            offload.join()

    def _take(self, tokens: int, where: Tokens) -> None:
        """Of the gradient of the first block's input, what belongs to virtual tokens."""
        if self.virtual and where.first_D is not None:
            self.virtual.take(self._spare("d", tokens)[:tokens], where.first_D)

    def _replay(self, rows: Rows, tokens: int, backward: bool) -> None:
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
        index_CM, targets_CM = (self._integers[name].view(-1, self._head.rows) for name in ("index", "targets"))

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
        kept = self.trained.gradients.clone()
        with self.own_stream():
            for run in steps.values():
                chunk.zero_()
                run()
        self.trained.gradients.copy_(kept)
        graphs: dict[str, Any] = {"chunk": chunk}
        for name, run in steps.items():
            graphs[name] = cuda.CUDAGraph()
            with cuda.graph(graphs[name], pool=self._pool, stream=self._stream):
                run()
            self._pool = graphs[name].pool()  # replays never overlap, so all graphs share their temporaries
        return graphs
