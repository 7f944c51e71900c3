"""The one declaration of every setting.

YAML files, `--set a.b=c`, the JSON schema, the studio's form and the table in
`docs/configuration.md` are all made from these classes. Names are the ecosystem's:
`TrainingArguments` of transformers, `LoraConfig` of peft, `GenerationConfig` of transformers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from tuneloom.types import Overflow, TrainOn

EMBEDDED_MODEL = "smollm2-135m-instruct"

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """A part of the config: typed, frozen, closed."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_enum_values=False, validate_default=True, allow_inf_nan=False)


class BaseModelConfig(Section):
    """The model that is taught; a plain string is its `path`."""

    path: str = Field(
        EMBEDDED_MODEL,
        min_length=1,
        description="A Hugging Face folder, a GGUF file, the embedded model's name, or a hub id.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    quantization: Literal["none", "4bit", "8bit"] = Field(
        "none",
        description="Load the frozen weights as bitsandbytes nf4 (4bit) or int8 (8bit); needs the extra `quant`.",
    )
    attn_implementation: Literal["auto", "packed", "flex", "sdpa", "eager"] = Field(
        "auto",
        description="Attention path; auto: the fastest on this machine, measured and kept in plan.json. `packed` runs samples "
        "end to end, shared prefixes once, `flex` too, by a kernel compiled for CUDA; with the others they are padded.",
    )


def _as_map(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, (str, dict)) else value


Column = Literal[
    "messages",
    "conversations",
    "conversation",
    "instruction",
    "input",
    "output",
    "history",
    "system",
    "tools",
    "prompt",
    "completion",
    "role",
    "content",
]


class SourceConfig(Section):
    """One source of conversations; a plain string is its `path`."""

    path: str = Field(
        min_length=1,
        description="A file, a folder with train files, a built-in set (`self_cognition`), a hub id (`owner/name`, "
        "`modelscope://owner/name`), or `folder/name` of a LLaMA-Factory `dataset_info.json`.",
    )
    count: PositiveInt | None = Field(
        None, description="Take exactly this many rows; a smaller set is repeated, and that is said."
    )
    share: Share | None = Field(None, description="Share of the whole mixture that comes from this source.")
    weight: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Use every row this many times; below 1, this share of the rows."
    )
    columns: dict[Column, str] = Field(
        default_factory=dict,
        description="Our name of a column: its name in the file, e.g. `instruction: question`; "
        "`role` and `content` are those of a message.",
    )
    roles: dict[Literal["system", "user", "assistant", "tool", "function_call"], str] = Field(
        default_factory=dict, description="Our name of a role: its name in the file, e.g. `assistant: agent`."
    )
    subset: str | None = Field(None, description="Of a Hugging Face set: its configuration.")
    split: str = Field(
        "train",
        pattern=r"^[\w.-]+$",
        description="Of a hub's set: which split; on ModelScope, what its files' names begin with.",
    )
    revision: str | None = Field(None, description="Of a hub's set: branch, tag or commit.")
    replay: Literal["self"] | None = Field(
        None, description="`self`: the base model writes the answers anew before training, so that it keeps its own voice."
    )

    @model_validator(mode="after")
    def _one_way_to_size(self) -> SourceConfig:
        given = [name for name in ("count", "share", "weight") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of count, share, weight; got {' and '.join(given)}")
        return self


Source = Annotated[SourceConfig, BeforeValidator(_as_map)]
Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_list)]


class DataConfig(Section):
    """What is taught, and how rows become samples."""

    train: Sources = Field(
        (SourceConfig(path="self_cognition"),), min_length=1, description="Source, or list of sources, to train on."
    )
    validation: Share | Literal[0] | Sources = Field(
        0, description="Share of the training rows held out, or a source of its own; 0 for none.", union_mode="left_to_right"
    )
    test: Sources = Field((), description="Source predicted after training, with ROUGE and BLEU.")
    max_samples: PositiveInt | None = Field(None, description="At most this many training samples.")
    cutoff_len: Annotated[int, Field(ge=8)] = Field(1024, description="Longest sample, in tokens.")
    overflow: Overflow = Field(
        Overflow.CUT_AT_TURN, description="A longer conversation: keep its leading whole turns, drop it, or stop."
    )
    train_on: TrainOn = Field(TrainOn.ASSISTANT, description="Which messages are supervised.")
    variables: dict[str, str] = Field(
        default_factory=dict, description="Values of `{{name}}`-like placeholders in the data, such as name and author."
    )

    def sources(self) -> tuple[SourceConfig, ...]:
        """Return every source: to train on, to validate on, to test on."""
        return tuple(source for _, source in self.roles())

    def roles(self) -> tuple[tuple[str, SourceConfig], ...]:
        """Return every source behind its role: train, validation or test."""
        validation = self.validation if isinstance(self.validation, tuple) else ()
        named = (("train", self.train), ("validation", validation), ("test", self.test))
        return tuple((role, source) for role, sources in named for source in sources)

    @field_validator("validation", "test")
    @classmethod
    def _held_out_whole(cls, held: Any, info: ValidationInfo) -> Any:
        """Refuse what only a source to train on can have."""
        without_effect = ["count", "share", "weight", *(["replay"] if info.field_name == "test" else [])]
        for source in held if isinstance(held, tuple) else ():
            for name in without_effect:
                if getattr(source, name) is not None:
                    raise ValueError(f"a source without {name}, which is for data.train alone")
        return held


class AdapterConfig(Section):
    """The adapter; names and meaning are `peft.LoraConfig`'s."""

    r: PositiveInt = Field(8, description="Rank.")
    lora_alpha: PositiveInt = Field(16, description="Scaling is alpha / r; with rsLoRA alpha / sqrt(r).")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout on the adapter's input.")
    target_modules: Literal["all-linear", "all-layers"] | tuple[str, ...] = Field(
        "all-linear",
        description="Names of modules, `all-linear` (all but the head), or `all-layers` (these and the embedding).",
    )
    use_rslora: bool = Field(False, description="Rank-stabilised scaling (arXiv:2312.03732).")
    use_dora: bool = Field(False, description="Weight-decomposed adaptation (arXiv:2402.09353).")
    init_lora_weights: bool | Literal["gaussian"] = Field(
        True, description="True: A random, B zero. `gaussian`: A normal with deviation 1/r, B zero."
    )
    modules_to_save: tuple[str, ...] = Field((), description="Modules trained whole and saved beside the adapter.")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases are trained.")
    continue_from: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="A run, a checkpoint, or an adapter in PEFT's layout, on the same base: a new run starts from its weights; "
        "the keys above that are not given are taken from it.",
    )

    @model_validator(mode="after")
    def _targets_named(self) -> AdapterConfig:
        if self.target_modules == ():
            raise ValueError("target_modules is empty; name modules, or use all-linear or all-layers")
        return self


Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]
Every = PositiveInt | Literal["epoch"] | None
Precision = Literal["auto", "bf16", "fp16", "fp32"]
Tracker = Literal["none", "tensorboard", "wandb", "mlflow", "swanlab", "trackio"]


class TrainingConfig(Section):
    """The optimizer's settings; names and meaning are `transformers.TrainingArguments`'."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(5e-5, description="Peak learning rate.")
    loraplus_lr_ratio: Annotated[float, Field(gt=0)] | None = Field(
        None, description="LoRA+ (arXiv:2402.12354): learning rate of B over that of A."
    )
    num_train_epochs: Annotated[float, Field(gt=0)] = Field(3.0, description="Passes over the data.")
    max_steps: int = Field(-1, ge=-1, description="Optimizer steps; -1: as the epochs say.")
    per_device_train_batch_size: PositiveInt = Field(2, description="Samples per process and accumulation step.")
    per_device_eval_batch_size: PositiveInt = Field(8, description="Prompts answered at a time when answers are written.")
    gradient_accumulation_steps: PositiveInt = Field(
        8, description="Times the batch size: samples an optimizer step. The engine packs them as it sees fit."
    )
    lr_scheduler_type: Scheduler = Field("cosine", description="Schedule of the learning rate, by transformers' names.")
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict, description="Extra arguments of the schedule.")
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Share of the steps spent warming up.")
    warmup_steps: NonNegativeInt = Field(0, description="Steps spent warming up; wins over warmup_ratio.")
    weight_decay: NonNegativeFloat = Field(0.0, description="Decoupled weight decay.")
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="AdamW's beta 1.")
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="AdamW's beta 2.")
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW's epsilon.")
    optim: Literal["adamw_torch", "adamw_torch_fused"] = Field("adamw_torch", description="Optimizer.")
    max_grad_norm: NonNegativeFloat = Field(1.0, description="Gradient norm is clipped to this; 0: never.")
    seed: NonNegativeInt = Field(42, description="Seed of the adapter's start, the data order and the dropout.")
    logging_steps: PositiveInt = Field(1, description="Steps between two step events.")
    eval_steps: Every = Field(None, description="Steps between two evaluations, or `epoch`; none: at the end only.")
    save_steps: Every = Field(None, description="Steps between two checkpoints, or `epoch`; none: at the end only.")
    save_total_limit: PositiveInt | None = Field(None, description="Checkpoints kept; the best and the last always are.")
    load_best_model_at_end: bool = Field(False, description="Publish the adapter of the best validation loss.")
    early_stopping_patience: PositiveInt | None = Field(
        None, description="Training ends after this many evaluations without a better validation loss; none: never early."
    )
    early_stopping_threshold: NonNegativeFloat = Field(
        0.0, description="A validation loss is better where it is lower than the best one by more than this."
    )
    precision: Precision = Field(
        "auto", description="Of weights and products. What the device cannot do becomes the nearest it can, and that is said."
    )
    tokens_per_microbatch: Literal["auto"] | PositiveInt = Field(
        "auto",
        description="Token budget of one pass through the model; never changes the result beyond rounding. "
        "auto: less where memory has no room for it.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute the activations of all layers: less memory, about half as much time again. "
        "Without it as few layers are as memory asks for.",
    )
    fsdp: Literal["auto", "none", "full_shard"] = Field(
        "auto",
        description="With several processes: `full_shard` shares the base's weights out among them, `none` keeps them whole on "
        "each. auto: shared out where they would leave a device too little memory.",
    )
    report_to: Tracker = Field(
        "none", description="Experiment tracker that also gets the figures; its package must be installed."
    )

    @model_validator(mode="before")
    @classmethod
    def _precision_aliases(cls, values: Any) -> Any:
        """Accept `fp16: true` and `bf16: true`, as TrainingArguments has them."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        flags = {name: values.pop(name) for name in ("fp16", "bf16") if name in values}
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise ValueError(f"{name} must be true or false, got {flag!r}")
        wanted = [name for name, flag in flags.items() if flag]
        if len(wanted) == 2 or (wanted and values.get("precision", wanted[0]) not in (wanted[0], "auto")):
            raise ValueError("precision, fp16 and bf16 contradict each other; keep one")
        if wanted:
            values["precision"] = wanted[0]
        return values

    @property
    def num_samples_per_step(self) -> int:
        """Effective batch size on one device: samples an optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


class GenerationConfig(Section):
    """How answers are written; names and meaning are `transformers.GenerationConfig`'s."""

    max_new_tokens: PositiveInt = Field(512, description="Longest answer, in tokens.")
    min_new_tokens: NonNegativeInt = Field(0, description="Shortest answer, in tokens.")
    do_sample: bool = Field(False, description="Sample; false: greedy.")
    temperature: Annotated[float, Field(gt=0)] = Field(0.7, description="Temperature of sampling.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(0.9, description="Nucleus of sampling.")
    top_k: NonNegativeInt = Field(0, description="Candidates of sampling; 0: all.")
    num_beams: PositiveInt = Field(1, description="Beams of beam search.")
    repetition_penalty: Annotated[float, Field(gt=0)] = Field(1.0, description="1: none.")


class EvaluationConfig(Section):
    """What is looked at during and after training."""

    prompts: tuple[str, ...] = Field(
        ("Who are you?", "你是谁？", "What is the capital of France?"),
        description="Answered at each evaluation; the answers are events of the run.",
    )
    sample_max_new_tokens: PositiveInt = Field(48, description="Longest answer to these prompts, in tokens.")
    max_rows: PositiveInt | None = Field(None, description="At most this many validation rows; none: all.")
    predict_with_generate: bool = Field(False, description="At each evaluation also write answers, and score ROUGE and BLEU.")
    max_generate_rows: PositiveInt = Field(50, description="Rows answered so, one per assistant turn, the first ones.")


BaseModelSetting = Annotated[BaseModelConfig, BeforeValidator(_as_map)]


class Config(Section):
    """All of a run's settings. Defaults alone train the embedded model on its built-in set."""

    base_model: BaseModelSetting = Field(default_factory=BaseModelConfig, description="The model that is taught.")
    output_dir: str = Field("runs", min_length=1, description="Parent of the run directories.")
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="Name of the run directory; taken names get a number. None: method and time.",
    )
    data: DataConfig = Field(default_factory=DataConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    generation: GenerationConfig = Field(default_factory=GenerationConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    @model_validator(mode="after")
    def _best_needs_validation(self) -> Config:
        if self.training.load_best_model_at_end and not self.data.validation:
            raise ValueError("training.load_best_model_at_end needs data.validation")
        return self

    @model_validator(mode="after")
    def _early_stopping_evaluates(self) -> Config:
        training = self.training
        if training.early_stopping_threshold and training.early_stopping_patience is None:
            raise ValueError("training.early_stopping_threshold needs training.early_stopping_patience")
        if training.early_stopping_patience is None:
            return self
        if not self.data.validation:
            raise ValueError("training.early_stopping_patience needs data.validation")
        if training.eval_steps is None:
            raise ValueError(
                "training.early_stopping_patience needs training.eval_steps: without it the end alone is evaluated"
            )
        return self

    @property
    def method(self) -> str:
        """Name of the method: lora, rslora, dora or rslora+dora."""
        named = [name for name, on in (("rslora", self.adapter.use_rslora), ("dora", self.adapter.use_dora)) if on]
        return "+".join(named) or "lora"
