"""What of a run decides its bytes: sizes of the model, the method, the largest micro-step, storage, device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fitune.config import Ia3Config, LoraConfig, MethodConfig, PrefixConfig, PromptLearning
from fitune.plan.arch import ArchSpec, Linear
from fitune.plan.hardware import Hardware
from fitune.plan.lengths import MicroStep
from fitune.plan.params import Tensors, adapted, trainable
from fitune.plan.saves import GROUPS, BlockShape, Level, bucket, check_tokens

Columns = tuple[int, int, int, int]
COLUMN_MULTIPLE = 16  # adapter columns of a group: keeps rows aligned to 16 bytes


@dataclass(frozen=True)
class Job:
    """What of a run decides its bytes.

    Attributes:
        dtype_bytes: of the base weights and of activations.
        quantization: none, int8, fp8, nf4 or fp4.
        level: what a block keeps (`saves.LEVELS`).
        step: the largest micro-step.
        max_length: longest row [tokens].
        master_bytes: of an element of train.optimizer_dtype.
        engine: False on the plain path.
    """

    arch: ArchSpec
    method: MethodConfig
    dtype_bytes: int
    quantization: str
    level: Level
    step: MicroStep
    max_length: int
    optimizer: str
    master_bytes: int
    hardware: Hardware
    engine: bool = True

    @property
    def columns(self) -> tuple[Columns, ...]:
        """Adapter columns of each block's groups; none on the plain path, where adapters stand apart."""
        if not self.engine:
            return ((0, 0, 0, 0),) * self.arch.layers
        return block_columns(self.arch, self.method)

    @property
    def shape(self) -> BlockShape:
        """A block with as many adapter columns as any has: buffers are the same for all."""
        qkv, o, up, down = (max(found) for found in zip(*self.columns, strict=True))
        shape = self.arch.block_shape((qkv, o, up, down))
        dropout = isinstance(self.method, LoraConfig) and self.method.dropout > 0
        if not self.engine:
            return shape
        fp8, scaled = self.quantization == "fp8", self._scaled(shape)
        return replace(shape, fp8=fp8, dropout=dropout, virtual=self.virtual_tokens, scaled=scaled)

    def _scaled(self, shape: BlockShape) -> int:
        """Width of the widest output or input that IA3 multiplies."""
        if not isinstance(self.method, Ia3Config):
            return 0
        groups = {linear.group for linear, _ in adapted(self.arch, self.method.target_modules)}
        return max(shape.qkv if "qkv" in groups else 0, shape.intermediate if "down" in groups else 0)

    def is_whole(self, number: int, linear: Linear) -> bool:
        """The weight of this layer of a block is in the model's dtype."""
        return self.quantization == "none" or (number, linear.path) in self.arch.whole

    def groups(self, whole: bool) -> Iterator[tuple[str, int, int, int]]:
        """Groups with layers in the model's dtype, or with quantized ones, of all blocks: outputs, inputs, columns."""
        for number, columns in enumerate(self.columns):
            found = {one.group for one in self.arch.linears if self.is_whole(number, one) == whole}
            sizes = self.arch.block_shape(columns).groups
            yield from ((group, *sizes[group]) for group in GROUPS if group in found)

    @property
    def kept_blocks(self) -> int:
        """Blocks that keep activations: those from the lowest trained one up."""
        return self.arch.layers - min(tensors.lowest for tensors in self.trained)

    @property
    def hosted(self) -> int:
        """Elements of the embedding in the host's memory: at level `offload`, unless the head is tied to it."""
        hosted = self.level == "offload" and self.engine and not self.hardware.on_cpu and not self.arch.tied
        return self.arch.vocab * self.arch.hidden if hosted else 0

    @property
    def capacity(self) -> int:
        """Tokens that the buffers of a micro-step are made for; on the plain path with padding."""
        if not self.engine:
            return self.step.padded + self.step.rows * self.virtual_tokens
        tokens = self.step.tokens(self.virtual_tokens)
        return tokens if self.hardware.on_cpu else bucket(tokens, tokens)

    @property
    def checked(self) -> int:
        """Tokens that the engine's buffers are made for until the self-check is done."""
        tokens = check_tokens(self.arch.vocab) + self.virtual_tokens
        return tokens if self.hardware.on_cpu else bucket(tokens, tokens)

    @property
    def own_gradients(self) -> bool:
        """The engine adds up the gradients of all parameters itself; those of encoders are left to autograd."""
        return self.engine and not isinstance(self.method, PromptLearning)

    @property
    def adapted(self) -> tuple[tuple[Linear, frozenset[int]], ...]:
        """Layers with an adapter, and in which blocks."""
        return adapted(self.arch, self.method.target_modules) if isinstance(self.method, LoraConfig) else ()

    @property
    def trained(self) -> tuple[Tensors, ...]:
        """Trainable tensors."""
        return trainable(self.arch, self.method)

    @property
    def num_trained(self) -> int:
        """Trainable parameters."""
        return sum(tensors.elements * tensors.copies for tensors in self.trained)

    def stored(self, *kinds: str) -> int:
        """Trainable parameters of these kinds (`params.Tensors`)."""
        return sum(tensors.elements * tensors.copies for tensors in self.trained if tensors.kind in kinds)

    @property
    def num_mastered(self) -> int:
        """Trainable parameters that are not stored in the masters' dtype, and so have masters."""
        beside = self.stored("beside") if self.master_bytes != 4 else 0
        return beside + (self.stored("own", "copy") if self.master_bytes != self.dtype_bytes else 0)

    @property
    def virtual_tokens(self) -> int:
        """Rows that virtual tokens take in front of every document; those of a prefix only on the engine."""
        if not isinstance(self.method, PromptLearning) or (isinstance(self.method, PrefixConfig) and not self.engine):
            return 0
        return self.method.num_virtual_tokens


def block_columns(arch: ArchSpec, method: MethodConfig) -> tuple[Columns, ...]:
    """Adapter columns R of the groups of each block: ranks of its adapted layers, their sum rounded up to 16."""
    if not isinstance(method, LoraConfig):
        return ((0, 0, 0, 0),) * arch.layers
    found = adapted(arch, method.target_modules)
    rows: list[Columns] = []
    for number in range(arch.layers):
        ranks = dict.fromkeys(GROUPS, 0)
        for linear, blocks in found:
            ranks[linear.group] += method.r if number in blocks else 0
        qkv, o, up, down = (-(-ranks[group] // COLUMN_MULTIPLE) * COLUMN_MULTIPLE for group in GROUPS)
        rows.append((qkv, o, up, down))
    return tuple(rows)
