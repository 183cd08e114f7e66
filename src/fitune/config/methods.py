"""The `method` section: one closed model per value of `method.name`, so that nobody sees another method's settings.

What each method does, costs and is good for: docs/methods.md.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field

from fitune.config.fields import Number, Section, Switch, Whole, check_path, no_boolean

MAX_VIRTUAL_TOKENS, MAX_WIDTH = 100_000, 1_000_000


def check_names(value: object) -> object:
    """A list of texts that are not empty; one text alone is a list of one."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError("give a list of texts, none of them blank, such as [first, second]")
    "".join(names).encode()  # a ValueError for halves of characters, which no file could hold
    if len(set(names)) < len(names):
        raise ValueError("a name stands there twice; give each once")
    return tuple(names)


def targets(*keywords: str) -> BeforeValidator:
    """A keyword, or names of modules."""

    def check(value: object) -> object:
        if value in keywords:
            return value
        either = ", ".join(f"`{keyword}`" for keyword in keywords)
        if not isinstance(value, list | tuple) or not all(isinstance(name, str) and name for name in value):
            raise ValueError(f"give {either} or a list of module names such as [q_proj, v_proj]")
        if not value:
            raise ValueError(f"an empty list adapts nothing; give {either} or module names")
        return value

    return BeforeValidator(check)


def check_adapter(value: object) -> object:
    """A path, or nothing."""
    return check_path(value) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(check_names)]
Adapter = Annotated[
    str | None,
    BeforeValidator(check_adapter),
    Field(
        description="Continue from an adapter of this method: a fitune run, its adapter folder, or a folder in PEFT's "
        "format. Its settings are taken; those given here must agree with them. None: start anew."
    ),
]
VirtualTokens = Annotated[
    int,
    BeforeValidator(no_boolean),
    Field(gt=0, le=MAX_VIRTUAL_TOKENS, description="Trained virtual tokens in front of every row."),
]
InitText = Annotated[
    str | None,
    Field(
        min_length=1,
        max_length=100_000,
        description="Text whose tokens start the virtual tokens, repeated until there are enough; with init: text.",
    ),
]


class LoraConfig(Section):
    """Low-rank adapters on linear layers (LoRA, arXiv:2106.09685), injected and stored by PEFT."""

    default_learning_rate: ClassVar[float] = 2e-4

    name: Literal["lora"] = Field(description="The method.")
    r: Whole = Field(8, gt=0, le=65536, description="Rank of the adapters.")
    alpha: Number = Field(16.0, gt=0, le=1e6, description="Scale: the adapter's output is multiplied by alpha / r.")
    dropout: Number = Field(0.0, ge=0, lt=1, description="Dropout probability on the adapters' input.")
    target_modules: Annotated[Literal["attention", "linear"] | tuple[str, ...], targets("attention", "linear")] = Field(
        "attention",
        description="Layers that get an adapter: `attention` (query and value projections, or the fused one), "
        "`linear` (every linear layer of the blocks), or a list of module names.",
    )
    rslora: Switch = Field(
        False, description="Scale by alpha / sqrt(r) instead (rsLoRA, arXiv:2312.03732): for ranks from about 32 up."
    )
    dora: Switch = Field(
        False,
        description="Train the length of each weight row apart from its direction (DoRA, arXiv:2402.09353); slower.",
    )
    init: Literal["default", "pissa", "olora"] = Field(
        "default",
        description="How adapters start: `default` (A random, B zero), or as a part of the weights that is taken out "
        "of them: the largest singular values (`pissa`, arXiv:2404.02948) or the first columns of a QR decomposition "
        "(`olora`, arXiv:2406.01775). The published adapter fits the unchanged base: it has twice the rank.",
    )
    lora_plus_ratio: Number = Field(
        1.0,
        gt=0,
        le=1e4,
        description="Learning rate of the B matrices divided by that of everything else (LoRA+, arXiv:2402.12354).",
    )
    modules_to_save: Names = Field(
        (),
        description="Modules outside the adapted layers that are trained whole and stored with the adapter, such as "
        "[embed_tokens, lm_head] or [norm]; tied ones stay tied.",
    )
    new_tokens: Names = Field(
        (),
        description="Texts that become tokens of their own: their rows of embedding and head are trained, and stored "
        "with the adapter.",
    )
    adapter: Adapter = None


class FullConfig(Section):
    """Train every parameter."""

    default_learning_rate: ClassVar[float] = 2e-5

    name: Literal["full"] = Field(description="The method.")


class FreezeConfig(Section):
    """Train some of the model's own parameters and freeze the rest: the last blocks, or whatever a pattern matches."""

    default_learning_rate: ClassVar[float] = 2e-5

    name: Literal["freeze"] = Field(description="The method.")
    num_layers: Whole | None = Field(
        None, ge=0, le=100_000, description="How many of the last blocks are trained. None: 2, or 0 with patterns."
    )
    patterns: Names = Field(
        (),
        description="Parameters that are trained besides, by name with `*` for any characters: [model.layers.3.*, "
        "'*.mlp.*'].",
    )
    also: Annotated[tuple[Literal["embedding", "norm", "head"], ...], BeforeValidator(check_names)] = Field(
        (), description="Parts outside the blocks that are trained besides: any of embedding, norm, head."
    )
    adapter: Adapter = None

    @property
    def num_blocks(self) -> int:
        """How many of the last blocks are trained."""
        if self.num_layers is not None:
            return self.num_layers
        return 0 if self.patterns else 2


class BitfitConfig(Section):
    """Train only the bias vectors (BitFit, arXiv:2106.10199)."""

    default_learning_rate: ClassVar[float] = 1e-3

    name: Literal["bitfit"] = Field(description="The method.")
    adapter: Adapter = None


class PromptConfig(Section):
    """Train the embeddings of virtual tokens in front of every row (prompt tuning, arXiv:2104.08691)."""

    default_learning_rate: ClassVar[float] = 1e-2

    name: Literal["prompt"] = Field(description="The method.")
    num_virtual_tokens: VirtualTokens = 20
    init: Literal["vocab", "text", "random"] = Field(
        "vocab",
        description="What virtual tokens start as: embeddings of tokens drawn from the vocabulary (`vocab`), of "
        "init_text (`text`), or random numbers far from any embedding (`random`), which hardly learn.",
    )
    init_text: InitText = None
    adapter: Adapter = None


class PtuningConfig(Section):
    """Train virtual tokens through a small network that makes their embeddings (P-tuning, arXiv:2103.10385)."""

    default_learning_rate: ClassVar[float] = 1e-3

    name: Literal["ptuning"] = Field(description="The method.")
    num_virtual_tokens: VirtualTokens = 20
    encoder: Literal["mlp", "lstm"] = Field(
        "mlp",
        description="The network: three linear layers, or a bidirectional LSTM of two layers and two linear ones.",
    )
    encoder_hidden_size: Whole | None = Field(
        None, gt=0, le=MAX_WIDTH, description="Inner width of the network. None: the model's hidden size."
    )
    dropout: Number = Field(0.0, ge=0, lt=1, description="Dropout probability between the layers of the LSTM.")
    adapter: Adapter = None


class PrefixConfig(Section):
    """Train keys and values that every layer sees in front of every row (prefix tuning, arXiv:2101.00190)."""

    default_learning_rate: ClassVar[float] = 1e-2

    name: Literal["prefix"] = Field(description="The method.")
    num_virtual_tokens: VirtualTokens = 20
    projection: Switch = Field(
        False,
        description="Make keys and values of all layers by a network of two layers from one embedding per virtual "
        "token, as in the paper; many parameters while training, none of them in the result.",
    )
    encoder_hidden_size: Whole | None = Field(
        None, gt=0, le=MAX_WIDTH, description="Inner width of that network. None: the width of a layer's keys."
    )
    init: Literal["vocab", "text", "random"] | None = Field(
        None,
        description="What keys and values start as: those of tokens drawn from the vocabulary (`vocab`), those of "
        "init_text (`text`), or random numbers (`random`). None: vocab, or random with projection.",
    )
    init_text: InitText = None
    adapter: Adapter = None

    @property
    def start(self) -> Literal["vocab", "text", "random"]:
        """What keys and values start as."""
        return self.init or ("random" if self.projection else "vocab")


class Ia3Config(Section):
    """Train one factor per output of some linear layers, or per input of the MLP's last one (IA3, arXiv:2205.05638)."""

    default_learning_rate: ClassVar[float] = 3e-3

    name: Literal["ia3"] = Field(description="The method.")
    target_modules: Annotated[
        Literal["default", "attention", "linear"] | tuple[str, ...], targets("default", "attention", "linear")
    ] = Field(
        "default",
        description="Layers that are scaled: `default` (keys, values and the MLP's last layer, as in the paper), "
        "`attention` (query and value projections, or the fused one), `linear` (every linear layer of the blocks), or "
        "a list of module names.",
    )
    feedforward_modules: Names | None = Field(
        None,
        description="Those of them whose inputs are scaled instead of their outputs. None: the MLP's last layer, if it "
        "is among them.",
    )
    adapter: Adapter = None


AnyMethod = (
    LoraConfig | FullConfig | FreezeConfig | BitfitConfig | PromptConfig | PtuningConfig | PrefixConfig | Ia3Config
)
MethodConfig = Annotated[AnyMethod, Field(discriminator="name")]
METHODS: dict[str, type[AnyMethod]] = {
    get_args(member.model_fields["name"].annotation)[0]: member for member in get_args(AnyMethod)
}


def new_tokens(method: AnyMethod) -> tuple[str, ...]:
    """Texts that the tokenizer of a run has as tokens besides its own."""
    return method.new_tokens if isinstance(method, LoraConfig) else ()


PromptLearning = PromptConfig | PtuningConfig | PrefixConfig  # virtual tokens instead of weights
