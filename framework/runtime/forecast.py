"""Predicts the peak of every phase, activations included, before a weight is read.

`forecast_run` and `forecast_inference` return the plan that `framework.plan.build` makes, with the parts of the phases
encode, train and sample as a rehearsal on fake tensors found them (`framework.runtime.rehearsal`). Nothing is
allocated: a 20B model is planned in seconds on any machine.
"""

from __future__ import annotations

from pathlib import Path

from framework.data import read_samples
from framework.errors import DataError
from framework.models import Family, get_family
from framework.plan.build import build_inference_plan, build_run_plan
from framework.plan.phases import TracedPhase, with_traced
from framework.plan.types import Phase, TracedWith, VramPlan
from framework.runtime.tracer import RunTracer, Tracer, largest_size, training_frames
from framework.schema.model import ModelConfig
from framework.schema.run import RunConfig

TEXT_TOKENS = 256
"""Length of a caption where the data can't be asked; a guess: two or three sentences of 40 words."""
# Of the captions with most characters, so many are tokenised to find the longest one.
_NUM_LONG_CAPTIONS = 32
# The same plan is asked for again when a run that has just been planned is started.
_NUM_REMEMBERED = 8
_traced_before: dict[tuple[str, int, str], VramPlan] = {}


def forecast_run(
    config: RunConfig,
    *,
    device: str,
    text_tokens: int | None = None,
    family: Family | None = None,
) -> VramPlan:
    """The plan of a training run with traced activations.

    device: "cpu", "cuda:0", ... as a label; it needn't be there.   text_tokens: length of the longest caption; None
    asks the data, and takes 256 where that can't be done (no data yet, or a tokenizer that isn't on this disk).
    family: with its tokenizer loaded; None makes one.
    The largest bucket of `data.max_px` is what a step is traced with. Raises as `build_run_plan`.
    """
    plan = build_run_plan(config, device=device)
    return traced_run(plan, config, text_tokens=text_tokens, family=family)


def traced_run(
    plan: VramPlan,
    config: RunConfig,
    *,
    text_tokens: int | None = None,
    family: Family | None = None,
) -> VramPlan:
    """A run's plan with the activations that it will have; see `forecast_run`."""
    family = family or get_family(config.model.family)
    if text_tokens is None:
        text_tokens = longest_caption(config, family)
    tracer = Tracer(family, plan, text_tokens)
    size_px = largest_size(config, family)
    known = (plan.model_dump_json(), tracer.text_tokens, _deciding(config))
    if known in _traced_before:
        return _traced_before[known]
    traced: dict[Phase, TracedPhase] = {}
    for phase in plan.phases:
        if phase.name == "encode":
            traced["encode"] = tracer.encode(phase, (*size_px, training_frames(config)))
        elif phase.name == "train":
            traced["train"] = RunTracer(tracer, config).train(phase)
        elif phase.name == "sample":
            guided = family.spec.guides(config.sample.guidance_scale)
            sampled = (*config.sample.size_px, config.sample.num_frames)
            traced["sample"] = tracer.sample(phase, sampled, guided=guided)
    used = TracedWith(
        batch_size=config.data.batch_size,
        size_px=size_px,
        sample_size_px=config.sample.size_px if "sample" in traced else None,
        text_tokens=tracer.text_tokens,
    )
    while len(_traced_before) >= _NUM_REMEMBERED:
        del _traced_before[next(iter(_traced_before))]
    _traced_before[known] = with_traced(plan, traced, used)
    return _traced_before[known]


def _deciding(config: RunConfig) -> str:
    """What activations depend on beside the plan."""
    return config.model_dump_json(
        include={
            "data": {"batch_size", "max_px", "max_aspect_ratio", "num_frames"},
            "objective": {"name", "weighting", "loss", "huber_delta", "distill_steps"},
            "optim": {"name", "ema"},
            "trainer": {"accumulate_grad_batches"},
            "sample": {"size_px", "num_frames", "guidance_scale"},
        }
    )


def forecast_inference(
    model: ModelConfig,
    *,
    size_px: tuple[int, int],
    device: str,
    num_tokens: int = TEXT_TOKENS,
    guided: bool = True,
    num_frames: int = 1,
) -> VramPlan:
    """The plan of a generation with traced activations; pictures are made one by one, so their number doesn't matter.

    size_px: width and height.   num_tokens: length of the longest prompt.   guided: classifier-free guidance.
    num_frames: of a clip.
    """
    plan = build_inference_plan(model, device=device)
    return traced_inference(
        plan,
        get_family(model.family),
        size_px=size_px,
        num_tokens=num_tokens,
        guided=guided,
        num_frames=num_frames,
    )


def traced_inference(
    plan: VramPlan,
    family: Family,
    *,
    size_px: tuple[int, int],
    num_tokens: int,
    guided: bool,
    num_frames: int = 1,
) -> VramPlan:
    """A generation's plan with the activations that it will have; see `forecast_inference`."""
    tracer = Tracer(family, plan, num_tokens)
    traced: dict[Phase, TracedPhase] = {
        "encode": tracer.encode(plan.phase("encode"), None),
        "sample": tracer.sample(plan.phase("sample"), (*size_px, num_frames), guided=guided),
    }
    used = TracedWith(
        batch_size=1, size_px=None, sample_size_px=size_px, text_tokens=tracer.text_tokens
    )
    return with_traced(plan, traced, used)


def longest_caption(config: RunConfig, family: Family) -> int:
    """Tokens of the longest caption or prompt; `TEXT_TOKENS` where data or tokenizer aren't on this disk."""
    source = Path(config.model.source).expanduser()
    folders = {name: source / folder for name, folder in family.spec.extras.items()}
    if not all(folder.is_dir() for folder in folders.values()):
        return TEXT_TOKENS
    try:
        captions = {sample.caption for sample in read_samples(config.data)}
    except DataError:
        return TEXT_TOKENS
    family.load_extras(folders)
    longest = sorted(captions, key=len)[-_NUM_LONG_CAPTIONS:]
    return family.count_text_tokens([*longest, *config.sample.prompts])
