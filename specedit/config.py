"""Settings of a run: `SpecEditConfig`, its presets, and how overrides are applied to them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from . import field_checks, registry, switch_checks
from .checks import integer, suggest
from .choices import CHOICES as CHOICES
from .choices import Attention, Decode, DraftCondition, KeyBias, Locked, Modulation, Restore, Rope, VerifyAt
from .field_checks import first_step, taken_steps
from .forecast_options import ForecastOptions, options_of
from .method_options import OWN, Method, method_of

# Threshold of the verification score (0..4) per `verify_at`. "full" is the paper's tau; the score at the draft's own
# size has another scale (no blur from upsampling the draft), so it has its own: benchmarks/results/verification.json.
DEFAULT_THRESHOLDS = {"full": 0.75, "draft": 0.2}
FULL_EDIT_SHARE = 0.9  # beyond this share of edited cells nothing is saved by locking the rest
STOCK_STEPS = 50  # of the stock run that the paper compares with
PIXEL_RESTORE_SIGMA = 0.12  # MrFlow's
MOST_NAMED = 4  # fields that differ from a preset whose name is kept

# Fields of earlier versions, and what to say to those who still pass them.
FORMER_FIELDS = {
    "second_look": "second_look is now verify_coarse",
    "couple_noise": "couple_noise was removed: it had no measured effect; the draft draws noise of its own",
    "cfg": "cfg was removed: it had no measured effect; both guidance branches run in one packed pass",
}

FORECAST_FIELDS = ("forecast_interval", "forecast_order", "forecast_weights")  # fill the options of a named forecast


@dataclass(frozen=True)
class SpecEditConfig:
    """How one edit is run. Immutable; every field is checked at construction. The defaults are the preset "balanced".

    Args:
        steps: model evaluations of the (coarse, mixed, full) stage. Their sum is the NFE; the draft is not counted.
        boundaries: (s1, s2), the sigma in (0, 1) at which the coarse and the mixed stage end. The mixed stage starts
            where expansion leaves it, at 2*s1/(1+s1), so s2 lies below that.
        draft_steps: model evaluations of the draft. 0: there is none, and the coarse stage verifies itself, which needs
            a coarse step.
        draft_scale: side of the image over side of the draft, 2 or 4 (4: 16 times fewer tokens).
        threshold: verification score (0..4) above which a cell is edited. None takes the default of `verify_at`.
        verify_at: "full" decodes the draft upsampled to the image's size, "draft" compares at the draft's own size.
        dilation: coarse cells by which the edited region grows on each side.
        uniform_stride: every k-th cell of every k-th row is expanded too (eq. 9). 0 or None: none of them.
        selector: what finds the cells to expand: "semantic" (the paper's verification), "edges", "variance", "uniform"
            or any other registered name.
        restore: "full" makes every token fine for the last steps; "reference" runs the mixed sequence to sigma 0 and
            takes the locked cells from the reference; "pixels" runs it to sigma 0 too, upsamples the locked cells as a
            picture, and takes one full step from `pixel_restore_sigma` (MrFlow, arXiv 2607.01642), which counts as one
            of the full stage's.
        pixel_restore_sigma: noise level of that step, between 0 and 1. Only with restore="pixels".
        locked: what becomes of unedited cells in a mixed sequence. "coarse" (the paper): one token each. "cached": keys
            and values from the stage's first step, or its latest 9th, stand for them. "reference": they are left out,
            since the reference shows them. The last two follow the reference from noise level to noise level.
        keep_pixels: everything outside the feathered edit mask is the input's own pixels.
        decode: "full" decodes the whole picture. "edited" decodes boxes around the edited cells; only with keep_pixels,
            which shows no other pixels. They are the whole decode's, within rounding with Qwen-Image-Edit's autoencoder
            and approximately with AutoencoderKL (FLUX.1-Kontext, LongCat), in pictures of 512 x 512 px and more. FLUX.2
            and Qwen-Image-2.1 do not offer it.
        verify_coarse: verify the clean prediction at the end of the coarse stage as the draft was, and edit what it
            changes too: the main run may choose another object than the draft. Only where unedited cells are kept
            (restore="reference", keep_pixels, or another `locked` than "coarse"), and after a draft. Takes no model
            evaluation. Must be True with draft_steps=0.
        key_bias: "area" adds log 4 to the logits of coarse keys in mixed sequences.
        rope: positions in mixed sequences: "scaled" ids, or "phase_aligned" per query resolution.
        attention: implementation of attention. "auto" is Triton on CUDA and PyTorch elsewhere; "stock" leaves the
            model's own processors in place.
        forecast: temporal cache: between full model evaluations the output is taken from earlier ones. None, "reuse"
            (FORA), "taylor" (TaylorSeer), "hermite" (HiCache), "foca", "freqca", "toca", "duca", "lesa" or any other
            registered name; or a method's options, as `specedit.forecast.Taylor(interval=3, order=1)`. Steps and NFE
            count cached evaluations too; the report says how many there were.
        forecast_interval: one evaluation in this many is full (None: 4). The first steps of a stage always are. This
            and the next two fill the options of a forecast given by name; with options they are an error.
        forecast_order: order of taylor, hermite, freqca and lesa (None: 2).
        forecast_weights: file of `python -m training.lesa`, for "lesa" on a model without packaged
            weights.
        draft_condition: the picture that Qwen's vision-language encoder sees for the draft's prompt: "full" is that of
            the main run, "small" one that is smaller by `draft_scale` a side, so that vision tokens do not outnumber
            the draft's own. No other model's prompt holds a picture.
        reference_refresh: None, or r >= 1: keys and values of text and reference are computed anew in the first step of
            a stage (and of the draft) and every r steps after; the steps between run the transformer over the target's
            tokens alone. An approximation but for r = 1, which changes nothing and saves nothing.
        reference_keep: None, or a share above 0, at most 1: after the first step of a stage, this share of the
            reference's tokens stays, those that the target attends to most (ReCAST, at about 0.15). An approximation
            but for 1. The samples of a batch then run one by one.
        guidance_range: None, or (low, high): true classifier-free guidance only runs at sigmas low <= sigma <= high,
            elsewhere the prompt's branch alone (arXiv 2404.07724). An approximation; without true guidance it changes
            nothing.
        modulation: "step": every step computes scale, shift and gate of the transformer's norms from its timestep.
            "once": those of all timesteps known so far are computed together, in two passes over the weights or so, and
            kept; equal within rounding. Where that cannot be, every step computes them, with one warning that says why.
        reuse_encodings: keep prompt embeddings, vision-language features and reference latents of the last inputs, and
            take them again where the same input comes again, until weights, LoRAs or their scales change. The result
            has the same bits. A draft's finding is kept too: the same picture, prompt and settings with another seed
            edit the cells that the first seed's draft found.
        method: "specedit", or another way to sample the edit: "steps", "ralu" or any other registered name, or a
            method's options, as `specedit.methods.Steps(count=10)`. It reads `attention`, `keep_pixels`,
            `reuse_encodings`, `decode`, `modulation` and the fields that it names; others must have their defaults.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    steps: tuple[int, int, int] = (7, 6, 5)
    boundaries: tuple[float, float] = (0.8, 0.65)
    draft_steps: int = 4
    draft_scale: int = 4
    threshold: float | None = None
    verify_at: VerifyAt = "draft"
    dilation: int = 1
    uniform_stride: int | None = 3
    selector: str = "semantic"
    restore: Restore = "full"
    pixel_restore_sigma: float = PIXEL_RESTORE_SIGMA
    locked: Locked = "coarse"
    keep_pixels: bool = False
    decode: Decode = "full"
    verify_coarse: bool = True
    key_bias: KeyBias = "area"
    rope: Rope = "scaled"
    attention: Attention = "auto"
    forecast: str | ForecastOptions | None = None
    forecast_interval: int | None = None
    forecast_order: int | None = None
    forecast_weights: str | None = None
    draft_condition: DraftCondition = "full"
    reference_refresh: int | None = None
    reference_keep: float | None = None
    guidance_range: tuple[float, float] | None = None
    modulation: Modulation = "step"
    reuse_encodings: bool = False
    method: str | Method = OWN

    def __new__(cls, *args: Any, **fields: Any) -> SpecEditConfig:
        for name in fields:
            if name in FORMER_FIELDS:
                raise TypeError(f"config: {FORMER_FIELDS[name]}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        # Choices first: the default threshold depends on one of them.
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                listed = ", ".join(map(repr, choices))
                raise ValueError(f"{name}: expected one of {listed}, got {value!r}{suggest(value, choices)}")
        registry.selectors.check(self.selector)
        if self.rope == "phase_aligned" and self.attention == "stock":
            raise ValueError(
                "rope: expected 'scaled' with attention='stock', the model's own processors, got 'phase_aligned'"
            )
        for name in ("keep_pixels", "verify_coarse", "reuse_encodings"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        self._set("steps", field_checks.steps(self.steps))
        self._set("pixel_restore_sigma", field_checks.pixel_restore_sigma(self.pixel_restore_sigma))
        switch_checks.check_restore(self, PIXEL_RESTORE_SIGMA)
        self._set("boundaries", field_checks.boundaries(self.boundaries))
        self._set("draft_steps", integer("draft_steps", self.draft_steps, 0))
        self._set("draft_scale", integer("draft_scale", self.draft_scale, 1, "2 or 4"))
        if self.draft_scale not in (2, 4):
            raise ValueError(f"draft_scale: expected 2 or 4, got {self.draft_scale}")
        self._set("threshold", field_checks.threshold(self.threshold, DEFAULT_THRESHOLDS[self.verify_at]))
        self._set("dilation", integer("dilation", self.dilation, 0))
        stride = 0 if self.uniform_stride is None else self.uniform_stride
        self._set("uniform_stride", integer("uniform_stride", stride, 0, "an integer of at least 1, or 0 or None"))
        self._set_forecast()
        self._set_method()
        if self.reference_refresh is not None:
            self._set("reference_refresh", integer("reference_refresh", self.reference_refresh, 1))
        self._set("reference_keep", field_checks.reference_keep(self.reference_keep))
        self._set("guidance_range", field_checks.guidance_range(self.guidance_range, self.forecast))
        switch_checks.check(self)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen; only used while it is being made

    def _set_method(self) -> None:
        method = method_of(self.method)
        self._set("_method", method)
        if method is not None and not isinstance(self.method, str):
            self._set("method", method)

    def _set_forecast(self) -> None:
        given = {name.removeprefix("forecast_"): getattr(self, name) for name in FORECAST_FIELDS}
        given = {name: value for name, value in given.items() if value is not None}
        self._set("_options", None)
        if self.forecast is None:
            for name, value in given.items():
                raise ValueError(f"forecast_{name}: expected None without a forecast, got {value!r}")
            return
        options = options_of(self.forecast, given)
        self._set("_options", options)
        if not isinstance(self.forecast, str):
            self._set("forecast", options)
        for name in given:  # as the options have checked and converted them
            self._set(f"forecast_{name}", getattr(options, name))

    @property
    def method_options(self) -> Method | None:
        """The options of `method`, given or made from its name; None for SpecEdit itself."""
        return self._method  # type: ignore[attr-defined, no-any-return]

    @property
    def forecast_options(self) -> ForecastOptions | None:
        """The options of `forecast`, given or made from its name and the other fields; None without a forecast."""
        return self._options  # type: ignore[attr-defined, no-any-return]

    @classmethod
    def preset(cls, name: str) -> SpecEditConfig:
        """The preset called `name`. ValueError lists the known ones."""
        if not isinstance(name, str) or name not in presets:
            raise ValueError(f"preset: expected one of {', '.join(presets)}, got {name!r}{suggest(name, presets)}")
        return presets[name]

    @property
    def preset_name(self) -> str | None:
        """The preset that this configuration equals, or None."""
        return next((name for name, config in presets.items() if config == self), None)

    @property
    def name(self) -> str:
        """The preset's name, followed by the fields that differ, as "turbo, restore='reference'".

        The preset is the one that `resolve` was given, else the nearest. "custom" where more than four fields differ.
        """
        if self.method_options is not None:
            return self.method_options.label
        if (equal := self.preset_name) is not None:
            return equal
        base = getattr(self, "_base", None) or min(presets, key=self._distance)
        changes = self._changes(presets[base])
        if len(changes) > MOST_NAMED:
            return "custom"
        return ", ".join([base, *(f"{field}={getattr(self, field)!r}" for field in changes)])

    def _changes(self, other: SpecEditConfig) -> list[str]:
        """Fields that differ from `other`; a threshold that only follows `verify_at` is none of them."""
        names = [field.name for field in dataclasses.fields(self)]
        changed = [name for name in names if getattr(self, name) != getattr(other, name)]
        if all(config.threshold == DEFAULT_THRESHOLDS[config.verify_at] for config in (self, other)):
            changed = [name for name in changed if name != "threshold"]
        return changed

    def _distance(self, preset: str) -> tuple[int, int]:
        other = presets[preset]
        return len(self._changes(other)), abs(self.nfe - other.nfe)

    def _replaced(self, base: str | None, **changes: Any) -> SpecEditConfig:
        """A copy with `changes` that remembers which preset it comes from."""
        config = dataclasses.replace(self, **changes)
        config._set("_base", base)
        return config

    @property
    def nfe(self) -> int:
        """Model evaluations of the main run; the draft is not counted."""
        return sum(self.steps) if self.method_options is None else self.method_options.nfe

    @property
    def finds_cells(self) -> bool:
        """Whether a run without a caller's edit_mask looks for what is edited: its mask decides something."""
        return switch_checks.finds_cells(self, self.steps)

    @property
    def uses_draft(self) -> bool:
        """Whether a run without a caller's edit_mask makes a draft to find it."""
        return self.draft_steps > 0 and self.finds_cells

    def needs_decoder(self, *, masked: bool) -> str | None:
        """What the run reads from the VAE's decoder before its end: None, "features" or "picture".

        masked: whether the caller gives an edit_mask.
        """
        if self.method_options is not None:
            return self.method_options.needs_decoder
        needed: str | None = registry.selectors[self.selector].needs_decoder
        return needed if self.finds_cells and not masked else None

    @property
    def is_mixed(self) -> bool:
        """Whether a run has a stage of mixed resolutions."""
        return taken_steps(self.steps, self.restore)[1] > 0

    @property
    def preserves_unedited(self) -> bool:
        """Whether what was not found is given back as it came, or goes on as the reference does."""
        return self.restore == "reference" or self.keep_pixels or self.locked != "coarse"

    @property
    def verifies_coarse(self) -> bool:
        """Whether a run without a caller's edit_mask verifies the end of its coarse stage, after a draft or without."""
        if not (self.finds_cells and self.steps[0] > 0):
            return False
        if self.draft_steps == 0:
            return True
        return bool(self.verify_coarse and self.preserves_unedited and registry.selectors[self.selector].verifies)

    def with_steps(self, n: int, *, masked: bool = False) -> SpecEditConfig:
        """The same configuration with NFE `n`, in the proportions of `steps` (largest remainder).

        A stage that had steps keeps at least one while `n` allows; when it does not, the last stages are kept,
        because they make the picture. With draft_steps=0 the coarse stage is kept too where it finds what is edited,
        which takes 2 steps: NFE is then at least 2. Where no stage is long enough for a forecast, there is none. An
        interval longer than every stage becomes the longest stage's steps, which computes the same steps.

        masked: whether the caller says what is edited, so that nothing has to find it.

        Raises:
            TypeError, ValueError: `n` is not an integer of at least 1.
        """
        n = integer("num_inference_steps", n, 1)
        if self.method_options is not None:
            return self._replaced(None, method=self.method_options.with_steps(n))
        steps = field_checks.scaled_stages(self.steps, self.restore, n)
        if not masked and switch_checks.lacks_finder(self, steps):
            steps = (1, 0, 1) if self.steps[2] else (1, 1, 0)
        return self._with_stages(steps)

    def with_strength(self, strength: float) -> SpecEditConfig:
        """The same configuration for a masked call that begins with the noised picture, and so skips the first steps.

        As many as the stock pipelines skip of NFE steps, the coarse stage's first. strength: above 0, at most 1.

        Raises:
            ValueError: restore="pixels" has fewer than 2 steps left, or the method begins with noise.
        """
        if (skipped := first_step(self.nfe, strength)) == 0:
            return self
        if self.method_options is not None:
            raise ValueError(f"strength: expected 1 with method={self.method_options.name!r}, got {strength}")
        steps = []
        for count in self.steps:
            steps.append(max(0, count - skipped))
            skipped -= count - steps[-1]
        if self.restore == "pixels" and sum(steps) == 1:
            raise ValueError(f"strength: expected one that leaves at least 2 steps to restore='pixels', got {strength}")
        return self._with_stages((steps[0], steps[1], steps[2]))

    def _with_stages(self, steps: tuple[int, int, int]) -> SpecEditConfig:
        """A copy with fewer or more steps in every stage, and what follows from them."""
        changes: dict[str, Any] = {"steps": steps}
        switch_checks.check_fewer_steps(self, steps)
        if switch_checks.lacks_finder(self, steps):  # a mask stands in for the coarse stage
            changes["draft_steps"] = SpecEditConfig.draft_steps
        if self.forecast is not None and not switch_checks.can_forecast(self, changes["steps"]):
            changes |= dict.fromkeys(("forecast", *FORECAST_FIELDS))
        elif self.forecast_options is not None:
            changes |= self._shorter_interval(max(switch_checks.stage_lengths(self, changes["steps"])))
        return self._replaced(self.preset_name or getattr(self, "_base", None), **changes)

    def _shorter_interval(self, longest: int) -> dict[str, Any]:
        """Changes that make the forecast's interval at most `longest`."""
        if self.forecast_interval is not None:
            return {"forecast_interval": min(self.forecast_interval, longest)}
        options = self.forecast
        if isinstance(options, ForecastOptions) and options.interval > longest:
            return {"forecast": dataclasses.replace(options, interval=longest)}
        return {}


def _paper(steps: tuple[int, int, int]) -> SpecEditConfig:
    """The setting of arXiv 2605.02152, section 3 and its ablations, without anything that the paper does not name.

    tau = 0.75 (table 10) on the draft upsampled to full size (eq. 6), 8 draft steps (table 11) at 1/16 of the tokens
    (eq. 4), k = 3 (eq. 9), all tokens fine in the last stage (section 3.2). Eq. 7 does not grow the edited set, and
    eq. 11 neither weights coarse keys nor verifies again. The boundaries are RALU's; the paper gives none.
    """
    return SpecEditConfig(
        steps=steps,
        boundaries=(0.7, 0.55),
        draft_steps=8,
        draft_scale=4,
        threshold=0.75,
        verify_at="full",
        dilation=0,
        uniform_stride=3,
        restore="full",
        verify_coarse=False,
        key_bias="none",
    )


# What keeps unedited cells as they were, and computes them once a stage.
_CACHED = SpecEditConfig(uniform_stride=0, restore="reference", locked="cached")

# docs/method.md says which curve each choice rests on.
presets: dict[str, SpecEditConfig] = {
    "quality": SpecEditConfig(steps=(11, 11, 8)),
    "balanced": SpecEditConfig(),
    "fast": SpecEditConfig(steps=(3, 3, 5)),
    "turbo": SpecEditConfig(steps=(2, 2, 5)),
    "ultra": dataclasses.replace(_CACHED, steps=(2, 2, 5), draft_steps=0),
    # For models that need few steps: one coarse step finds what a short draft has missed, and all others refine.
    "few-8": dataclasses.replace(_CACHED, steps=(1, 5, 2), draft_steps=2, dilation=2, boundaries=(0.85, 0.7)),
    "few-4": dataclasses.replace(_CACHED, steps=(1, 2, 1), draft_steps=2, dilation=2, boundaries=(0.7, 0.55)),
    # As the paper runs step-distilled models (FLUX.1-Kontext-Lightning and the like).
    "lightning-8": SpecEditConfig(steps=(2, 2, 4), boundaries=(0.7, 0.55)),
    "lightning-6": SpecEditConfig(steps=(1, 2, 3), boundaries=(0.7, 0.55)),
    # The FLOPs of the paper's tables add up to 5 full steps and 13, 6 or 4 cheap ones; to 8 and 22 at NFE 30.
    "paper": _paper((7, 6, 5)),
    "paper-30": _paper((11, 11, 8)),
    "paper-18": _paper((7, 6, 5)),
    "paper-11": _paper((3, 3, 5)),
    "paper-9": _paper((2, 2, 5)),
}

STANDARD_PRESETS = ("quality", "balanced", "fast", "turbo")  # what is timed and compared with stock
STANDARD_RESTORES = ("full", "reference")  # likewise
DEFAULT_PRESET = "balanced"


def fitted(config: SpecEditConfig, *, skips_tokens: bool) -> SpecEditConfig:
    """The configuration for a model that cannot compute some target tokens beside kept keys and values of the others.

    A preset with locked="cached" then leaves unedited cells out, locked="reference". Any other configuration is as it
    was.
    """
    base = config.preset_name or getattr(config, "_base", None)
    if skips_tokens or config.locked != "cached" or base is None or presets[base].locked != "cached":
        return config
    return config._replaced(base, locked="reference")


def resolve(value: str | SpecEditConfig | None = None, **overrides: Any) -> SpecEditConfig:
    """A configuration from a preset's name, a SpecEditConfig, or None (the default preset), with fields overridden.

    A threshold that is the default of `verify_at` follows when `verify_at` is overridden.

    Raises:
        TypeError: `value` is something else, or an override is not a field (the closest field is suggested).
        ValueError: no such preset, or a field's value is wrong.
    """
    if value is None:
        value = DEFAULT_PRESET
    if isinstance(value, str):
        value = SpecEditConfig.preset(value)
    if not isinstance(value, SpecEditConfig):
        raise TypeError(
            f"config: expected a preset name ({', '.join(presets)}), a SpecEditConfig or None, "
            f"got {value!r} ({type(value).__name__})"
        )
    fields = [field.name for field in dataclasses.fields(SpecEditConfig)]
    for name in overrides:
        if name in FORMER_FIELDS:
            raise TypeError(f"config: {FORMER_FIELDS[name]}")
        if name not in fields:
            hint = suggest(name, fields) or f"; the fields are {', '.join(fields)}"
            raise TypeError(f"config: {name!r} is not a field{hint}")
    if "verify_at" in overrides and value.threshold == DEFAULT_THRESHOLDS[value.verify_at]:
        overrides.setdefault("threshold", None)
    return value._replaced(value.preset_name or getattr(value, "_base", None), **overrides) if overrides else value
