"""Noise levels and loss of kohya's trainers, as `objective` here."""

from __future__ import annotations

from framework.migrate.given import Given

_BY_SIZE = ("flux_shift", "qwen_shift", "flux2_shift", "krea2_shift", "ideogram4_shift")
_LOSSES = {"l2": "mse", "mse": "mse", "huber": "huber", "smooth_l1": "huber"}
_NOISE_LEVEL_SETTINGS = (
    "timestep_sampling", "sigmoid_scale", "discrete_flow_shift", "weighting_scheme", "logit_mean", "logit_std",
    "mode_scale", "model_prediction_type",
)  # fmt: skip


def set_objective(given: Given, trainer: str, family: str) -> None:
    """Write how noise levels are drawn and what the loss is."""
    draft = given.draft
    if family == "sdxl":
        draft.set_("objective.name", "ddpm", "SDXL predicts noise")
        for name in _NOISE_LEVEL_SETTINGS:
            if given.has(name):
                draft.note("unneeded", name, "SDXL's scripts don't read it.")
        given.taken |= set(_NOISE_LEVEL_SETTINGS)
    else:
        draft.set_("objective.name", "flow_matching", family)
        _set_sampling(given, trainer)
        _set_weighting(given, trainer)
        given.taken |= set(_NOISE_LEVEL_SETTINGS)
    if family == "flux" and trainer == "kohya":
        draft.set_(
            "objective.guidance",
            given.number("guidance_scale", 3.5),
            given.source("guidance_scale"),
        )
    _set_limits(given, family, trainer)
    loss = given.text("loss_type")
    if loss in _LOSSES:
        draft.set_("objective.loss", _LOSSES[loss], given.source("loss_type"))
    elif loss:
        draft.note("lost", "loss_type", f"'{loss}' isn't offered; mse and huber are.")
    width = given.number("huber_c", 0.1)
    if draft.value("objective.loss") == "huber":
        draft.set_("objective.huber_delta", width, given.source("huber_c"))
        if loss != "huber" or given.text("huber_schedule", "snr") != "constant":
            draft.note(
                "changed",
                "loss_type",
                "The width of the Huber loss is the same at all noise levels.",
            )


def _set_sampling(given: Given, trainer: str) -> None:
    draft, sampling = given.draft, given.text("timestep_sampling", "sigma")
    factor = given.number("discrete_flow_shift", 3.0 if trainer == "kohya" else 1.0)
    source = given.source("timestep_sampling")
    shift: str | float | None = 1.0
    if sampling in ("shift", "sigma"):
        shift = factor
    elif sampling in _BY_SIZE:
        shift = "scheduler"
    elif sampling not in ("uniform", "sigmoid"):
        text = f"'{sampling}' isn't offered; logit_normal without a shift is written."
        draft.note("lost", "timestep_sampling", text)
    if sampling == "uniform":
        draft.set_("objective.timestep_sampling", "uniform", source)
    elif sampling == "sigma":
        _set_density(given, source)
    else:
        draft.set_("objective.timestep_sampling", "logit_normal", source)
        draft.set_("objective.logit_mean", 0.0, source)
        scale = given.number("sigmoid_scale", 1.0)
        draft.set_("objective.logit_std", scale, given.source("sigmoid_scale"))
    shifted = sampling in ("shift", "sigma")
    draft.set_("objective.shift", shift, given.source("discrete_flow_shift") if shifted else source)
    if sampling in _BY_SIZE:
        text = "The shift follows from the picture's size as the checkpoint's scheduler says."
        draft.note("check", "timestep_sampling", text)


def _set_density(given: Given, source: str) -> None:
    """`sigma`: an index drawn by a density, counted from the noisy end of the schedule."""
    draft, scheme = given.draft, given.text("weighting_scheme", "none")
    if scheme != "logit_normal":
        draft.set_("objective.timestep_sampling", "uniform", source)
        if scheme == "mode":
            draft.note(
                "lost", "weighting_scheme", "mode isn't offered; noise levels are drawn uniformly."
            )
        return
    mean, std = given.number("logit_mean", 0.0) or 0.0, given.number("logit_std", 1.0)
    draft.set_("objective.timestep_sampling", "logit_normal", given.source("weighting_scheme"))
    draft.set_("objective.logit_mean", -mean if mean else 0.0, given.source("logit_mean"))
    draft.set_("objective.logit_std", std, given.source("logit_std"))
    if mean:
        text = "The index counts from the noisy end there, so the mean changes its sign."
        draft.note("changed", "logit_mean", text)


def _set_weighting(given: Given, trainer: str) -> None:
    """The weight of the loss; sd-scripts' default prediction adds a factor sigma squared of its own."""
    draft, scheme = given.draft, given.text("weighting_scheme", "none")
    kind = given.text("model_prediction_type", "sigma_scaled") if trainer == "kohya" else "raw"
    source = given.source("weighting_scheme")
    if trainer != "kohya":
        if scheme in ("sigma_sqrt", "cosmap"):
            draft.set_("objective.weighting", scheme, source)
    elif kind == "sigma_scaled" and scheme == "sigma_sqrt":
        draft.set_("objective.weighting", "none", f"{source} undoes the factor of sigma_scaled")
    elif kind != "raw":
        text = "sigma_scaled weights the loss by sigma squared, which isn't offered; raw is what is done."
        if kind == "additive":
            text = "additive isn't offered; the velocity is predicted, as with raw."
        draft.note("lost", f"model_prediction_type {kind}", text)


def _set_limits(given: Given, family: str, trainer: str) -> None:
    """min_timestep and max_timestep, 0 to 1000, and Wan 2.2's boundary between its experts."""
    draft = given.draft
    if family == "flux" and trainer == "kohya":
        if given.has("min_timestep") or given.has("max_timestep"):
            draft.note(
                "unneeded", "min_timestep, max_timestep", "FLUX.1's script doesn't read them."
            )
        given.taken |= {"min_timestep", "max_timestep"}
        return
    low, high = given.number("min_timestep"), given.number("max_timestep")
    if low:
        draft.set_("objective.sigma_min", low / 1000, given.source("min_timestep"))
    if high and high < 1000:
        draft.set_("objective.sigma_max", high / 1000, given.source("max_timestep"))
    if (low or high) and trainer == "musubi":
        row = given.table.row("min_timestep")
        draft.note("changed", "min_timestep, max_timestep", row.note if row else "")
    if family == "wan2_2" and given.has("dit_high_noise"):
        boundary = given.number("timestep_boundary", 875.0) or 875.0
        share = boundary if boundary <= 1 else boundary / 1000
        draft.set_("objective.sigma_min", share, given.source("timestep_boundary"))
        text = (
            "This recipe trains the high-noise expert. For the other copy it with the adapter below model.dit_2, "
            f"model.dit.trainable: none, objective.sigma_min: 0 and objective.sigma_max: {share:g}."
        )
        draft.note("check", "dit_high_noise", text)
