"""Find inputs for a model of which only the config and the signature of the forward are known.

A `Feed` makes arguments by their names, from the sizes in the config. What the config leaves open are *knobs* (the size
of images, the layout of sounds). `find_inputs` runs the model on a first guess. If that raises, `mend` turns a knob, or
adds an argument, according to what the error says, and the model runs again.

`MENDS` is the table of errors and what to do about them.
"""

from __future__ import annotations

import inspect
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, IDS = 99, (10, 80)  # ordinary tokens are drawn from IDS; special tokens have the ids above
RICH = (
    "pixel_values", "input_features", "input_values", "image_grid_thw", "spatial_shapes", "pixel_position_ids",
    "image_position_ids", "pixel_attention_mask", "mm_token_type_ids", "image_grid_hws", "tgt_sizes", "target_sizes",
    "is_longer",
)  # fmt: skip
"""Arguments that let a model use parts that text alone does not reach."""
IMAGES = (
    "pixel_values", "images", "image", "pixel_values_images", "prompt_pixel_values", "high_res_pixel_values",
    "pixel_values_local",
)  # fmt: skip
GRIDS = ("image_grid_thw", "grid_thw", "video_grid_thw", "image_grid_hws", "grid_hws")
BUDGET = 30  # seconds of CPU time for one model
ONE_TRY = 20  # seconds of CPU time for one forward


class NoModel(Exception):
    """Raised if a model type cannot be built, or does not run on any of the inputs that were tried."""


class Feed:
    """Makes arguments for the forward of one model.

    Args:
        model: The model; its config and the signature of its forward are read.
        knobs: Settings that differ from the first guess.
    """

    def __init__(self, model: nn.Module, **knobs: Any) -> None:
        config = getattr(model, "config", None)
        self.settings = list(_walk(config.to_dict())) if config is not None else []
        signature = inspect.signature(model.forward).parameters.values()
        self.accepts = [p.name for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.required = [p.name for p in signature if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        image = (
            self.setting("image_size", "img_size", "input_size", among="vision|backbone")
            or self.setting("image_size", "img_size", "max_img_size")
            or 32
        )
        accepts = set(self.accepts)
        packed, patches = accepts & set(GRIDS), accepts & {"spatial_shapes", "pixel_position_ids", "image_position_ids"}
        self.knobs: dict[str, Any] = {
            "batch": 2, "length": 8, "rows": 1,
            "image": image if isinstance(image, list | tuple) else (image, image),
            "channels": self.number(3, "num_channels", "in_channels", "in_chans", "num_input_channels"),
            "frames": self.number(2, "num_frames", "frames_per_clip"),
            "pixels": "packed" if packed else "patches" if patches else "image", "packed": None, "cameras": False,
            "mel": self.number(80, "num_mel_bins", "n_mels", "input_dim", "feature_size", "input_feat_per_channel",
                               "mel_dim"),
            "time": self.number(0, "max_length") or 2 * self.number(50, "max_source_positions"),
            "features": "mel, time", "samples": 4000, "wave": "flat",
            "hidden": self.number(32, "hidden_size", "d_model", "n_embd", "embed_dim", "hidden_dim", "dim"),
            "fill": {},
        } | knobs  # fmt: skip

    def setting(self, *names: str, among: str = "") -> Any:
        """Return the number or list that the config has under one of these names, or None.

        The setting that is nearest to the top of the config is taken.

        Args:
            names: Names, the preferred ones first.
            among: A pattern that the names of the enclosing configs must match.
        """
        hits = [
            (len(path), names.index(path[-1]), value)
            for path, value in self.settings
            if path[-1] in names
            and value is not None
            and not isinstance(value, bool | str)
            and (not among or re.search(among, ".".join(path[:-1])))
        ]
        return min(hits, key=lambda hit: hit[:2])[2] if hits else None

    def number(self, default: int, *names: str, among: str = "") -> int:
        """Return a setting as one number, of a list its first."""
        value = self.setting(*names, among=among) or default
        while isinstance(value, list | tuple):
            value = value[0]
        return int(value)

    def __call__(self, names: list[str]) -> dict[str, Any]:
        """Return arguments of these names. Those that cannot be made are left out."""
        g = torch.Generator().manual_seed(1)
        arguments = {name: self.make(name, g) for name in names}
        return {name: value for name, value in arguments.items() if value is not None}

    def make(self, name: str, g: torch.Generator) -> Any:
        """Return one argument, drawn with g; None if its name is unknown."""
        k = self.knobs
        B, L, (H, W), C, F, mel, steps = (
            k[n] for n in ("batch", "length", "image", "channels", "frames", "mel", "time")
        )
        P = self.number(0, "patch_size", among="vision") or self.number(16, "patch_size", "spatial_patch_size")
        T, merge = self.number(1, "temporal_patch_size"), self.number(1, "spatial_merge_size", "merge_size")
        rows = 2 * merge * self.number(1, "pooling_kernel_size")  # rows of patches in each image
        vocab = min(
            [v for path, v in self.settings if path[-1] == "vocab_size" and isinstance(v, int) and v > 2] or [VOCAB]
        )
        docs, context, future = (
            self.number(2, "n_docs"),
            self.number(32, "context_length", "seq_length"),
            self.number(1, "prediction_length"),
        )
        past = context + max(self.setting("lags_sequence") or [0])
        series = self.number(0, "num_input_channels") or self.number(1, "input_size")
        channels = (series,) if series > 1 or self.setting("num_input_channels") else ()

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        def ones(*shape: int) -> Tensor:
            return torch.ones(*shape, dtype=torch.long)

        def tokens(length: int = L) -> Tensor:
            low, high = (IDS[0], min(IDS[1], vocab)) if vocab > IDS[0] + 5 else (min(3, vocab - 1), vocab)
            return torch.randint(low, high, (B, length), generator=g)

        def input_ids() -> Tensor:
            """Return token ids that begin with the placeholders of images and sounds."""
            return torch.cat([*(torch.full((B, n), token) for token, n in k["fill"].items()), tokens()], 1)

        def pixels() -> Tensor:
            shapes = {
                "image": (B, C, H, W), "several": (B, 1, C, H, W), "video": (B, F, C, H, W), "volume": (B, C, F, H, W),
                "one": (C, H, W), "packed": (B * rows * rows, k["packed"] or C * T * P * P),
                "patches": (B, rows * rows, C * P * P), "tiles": (B * rows * rows, C, P, P),
                "boxed": (1, B * rows * rows, C, P, P), "tiled": (B, 1, self.number(4, "max_num_tiles"), C, H, W),
            }  # fmt: skip
            return noise(*shapes[k["pixels"]])

        def features() -> Tensor:
            shapes = {"mel, time": (B, mel, steps), "time, mel": (B, steps, mel), "1, time, mel": (B, 1, steps, mel)}
            return noise(*shapes[k["features"]])

        def wave() -> Tensor:
            shapes = {"flat": (B, k["samples"]), "channel": (B, 1, k["samples"]), "mel": (B, steps, mel)}
            return noise(*shapes[k["wave"]])

        def video() -> Tensor:
            in_patches = "video_grid_thw" in self.accepts
            return noise(B * rows * rows, C * T * P * P) if in_patches else noise(B, F, C, H, W)

        def patch_positions() -> Tensor:
            return torch.cartesian_prod(torch.arange(rows), torch.arange(rows)).expand(B, -1, 2).clone()

        def kinds() -> Tensor:
            """Return the kind of each token: 1 for placeholders, 0 for text."""
            ids = input_ids()
            return sum(((ids == token).long() for token in k["fill"]), torch.zeros_like(ids))

        def pixel_mask() -> Tensor:
            if k["pixels"] == "patches":
                return ones(B, rows * rows)
            return torch.ones(B, 1, dtype=torch.bool) if k["cameras"] else ones(B, H, W)

        def flattened() -> Tensor:
            """Return patches, each with its row and column in front."""
            positions = torch.cartesian_prod(torch.arange(1.0, 5), torch.arange(1.0, 5)).expand(B, -1, -1)
            return torch.cat([positions, noise(B, 16, C * P * P)], -1)

        makers: dict[str, Callable[[], Any]] = {
            "input_ids": input_ids,
            "mm_token_type_ids": kinds,
            "token_type_ids": lambda: torch.zeros_like(input_ids()),
            **dict.fromkeys(
                ("attention_mask", "decoder_attention_mask", "padding_mask"),
                lambda: ones(B, L + sum(k["fill"].values())),
            ),
            **dict.fromkeys(("qformer_input_ids", "classes_input_ids", "tasks_input_ids"), tokens),
            **dict.fromkeys(
                ("decoder_input_ids", "text_input_ids", "audio_input_ids"), lambda: tokens().repeat(k["rows"], 1)
            ),
            "task_inputs": lambda: tokens(self.number(L, "task_seq_len")),
            "use_cache": lambda: False,
            "context_input_ids": lambda: 10 * ones(B * docs, L),
            "context_attention_mask": lambda: ones(B * docs, L),
            "doc_scores": lambda: noise(B, docs),
            **dict.fromkeys(
                ("inputs_embeds", "hidden_states", "encoder_hidden_states", "inputs"), lambda: noise(B, L, k["hidden"])
            ),
            **dict.fromkeys(IMAGES, pixels),
            **({"hidden_states": pixels} if k["pixels"] == "packed" else {}),
            **dict.fromkeys(("pixel_values_videos", "pixel_values_video"), video),
            "pixel_mask": pixel_mask,
            "pixel_attention_mask": pixel_mask,
            "prompt_masks": lambda: noise(B, C, H, W),
            "flattened_patches": flattened,
            **dict.fromkeys(
                ("image_grid_thw", "grid_thw", "video_grid_thw"), lambda: torch.tensor([[1, rows, rows]] * B)
            ),
            **dict.fromkeys(
                ("image_grid_hws", "grid_hws", "spatial_shapes", "tgt_sizes", "target_sizes"),
                lambda: torch.tensor([[rows, rows]] * B),
            ),
            **dict.fromkeys(("pixel_position_ids", "image_position_ids"), patch_positions),
            **dict.fromkeys(("image_sizes", "original_sizes", "target_size"), lambda: torch.tensor([[H, W]] * B)),
            "merge_sizes": lambda: torch.tensor([merge] * B),
            "image_attention_mask": lambda: ones(B, L, 1),
            "image_embeds_position_mask": (
                lambda: (torch.arange(L) < self.number(1, "latent_query_num")).expand(B, L).clone()
            ),
            "bbox": lambda: torch.zeros(B, L, 4, dtype=torch.long),
            "visual_feats": lambda: noise(B, 5, self.number(1, "visual_feat_dim")),
            "visual_pos": lambda: noise(B, 5, self.number(1, "visual_pos_dim")),
            **dict.fromkeys(
                ("input_features", "audio_features", "audio_values", "audio_mel", "mel_spectrogram", "spectrogram"),
                features,
            ),
            **dict.fromkeys(
                ("input_features_mask", "feature_attention_mask", "audio_mel_mask"), lambda: ones(B, steps)
            ),
            **dict.fromkeys(("input_values", "audio", "waveform", "input_audio"), wave),
            "aspect_ratio_ids": lambda: ones(B, 1),
            "aspect_ratio_mask": lambda: ones(B, 1, self.number(4, "max_num_tiles")),
            "is_longer": lambda: torch.zeros(B, 1, dtype=torch.bool),
            "past_values": lambda: noise(B, past, *channels),
            "past_observed_mask": lambda: torch.ones(B, past, *channels),
            "past_values_padding": lambda: torch.zeros(B, context),
            "freq": lambda: torch.zeros(B, 1, dtype=torch.long),
            "past_time_features": lambda: noise(B, past, self.number(0, "num_time_features")),
            "future_values": lambda: noise(B, future),
            "future_time_features": lambda: noise(B, future, self.number(0, "num_time_features")),
            "states": lambda: noise(B, L, self.number(1, "state_dim")),
            "actions": lambda: noise(B, L, self.number(1, "act_dim")),
            "rewards": lambda: noise(B, L, 1),
            "returns_to_go": lambda: noise(B, L, 1),
            "timesteps": lambda: torch.arange(L).expand(B, L).clone(),
        }
        if name not in makers and name.endswith("_embeds") and name in self.required:
            return noise(B, L, k["hidden"])
        return makers[name]() if name in makers else None


Setting = tuple[tuple[str, ...], Any]
"""A setting of a config: the path of names that leads to it, and its value."""


def _walk(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[Setting]:
    """Yield every setting of a config and of the configs inside it, with the path of its names."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _walk(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


# --- learning from errors ---------------------------------------------------------------------------------------------

Mend = Callable[[Feed, list[str], re.Match[str]], bool]
MENDS: list[tuple[str, Mend]] = []
"""Patterns of error messages, each with a function that changes the feed or the names, and returns whether it could.

Of all patterns that match, the first whose function can do something is used.
"""


def _on_error(pattern: str) -> Callable[[Mend], Mend]:
    def register(mend: Mend) -> Mend:
        MENDS.append((pattern, mend))
        return mend

    return register


def _set(feed: Feed, **knobs: Any) -> bool:
    """Turn knobs. Return False if they have these values already."""
    changed = any(feed.knobs[name] != value for name, value in knobs.items())
    feed.knobs.update(knobs)
    return changed


@_on_error(r"(Image|Video|Audio|image|audio|video)[a-z ]*features and \w+ tokens do not match.*?(\d+)\D+(\d+)")
def _placeholders(feed: Feed, names: list[str], m: re.Match[str]) -> bool:
    """Put the wanted number of placeholders into input_ids."""
    kind, have, want = m[1].lower(), int(m[2]), int(m[3])
    pattern = rf"{kind}_token_(id|index)|{kind}_(token|pad)_id|media_token_id|im_patch_id"
    token = next((v for path, v in feed.settings if re.fullmatch(pattern, path[-1]) and isinstance(v, int)), None)
    if have == want:  # the model counted numbers, not tokens
        want //= feed.setting("hidden_size", among="text") or feed.knobs["hidden"]
    count, rest = divmod(want, feed.knobs["batch"])
    return token is not None and count > 0 and not rest and _set(feed, fill=feed.knobs["fill"] | {token: count})


@_on_error(r"to have (\d+) channels, but got (\d+)")
def _channels(feed: Feed, names: list[str], m: re.Match[str]) -> bool:
    k, want, got = feed.knobs, int(m[1]), int(m[2])
    if want == 1 and got == k["batch"] and "input_values" in names and k["wave"] == "flat":
        return _set(feed, wave="channel")
    if got == k["channels"] and k["pixels"] == "image" and "pixel_values" in names:
        return _set(feed, channels=want)
    if got == k["time"] and k["features"] == "mel, time":
        return _set(feed, features="time, mel")
    if got == k["mel"] and k["features"] == "time, mel":
        return _set(feed, features="mel, time")
    return got == k["mel"] and _set(feed, mel=want)


@_on_error(r"Input image size \(\d+\*\d+\) doesn't match model \((\d+)\*(\d+)\)|size \(\d+, ?\d+\).*?\((\d+), ?(\d+)\)")
def _image_size(feed: Feed, names: list[str], m: re.Match[str]) -> bool:
    return _set(feed, image=(int(m[1] or m[3]), int(m[2] or m[4])))


@_on_error(r"length.*?to be (?:of length )?(\d+), but")
def _time(feed: Feed, names: list[str], m: re.Match[str]) -> bool:
    return _set(feed, time=int(m[1]))


@_on_error(r"mat1 and mat2 shapes cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)")
def _width(feed: Feed, names: list[str], m: re.Match[str]) -> bool:
    k, got, want = feed.knobs, int(m[1]), int(m[2])
    packed = (k["pixels"] == "packed" and k["packed"] is None and "pixel_values" in names) or "hidden_states" in names
    if packed and _set(feed, packed=want):
        return True
    for knob in ("hidden", "mel"):
        if k[knob] == got:
            return _set(feed, **{knob: want})
    return got == k["time"] and _set(
        feed, features="time, mel" if k["features"] == "mel, time" else "mel, time", mel=want
    )


@_on_error(r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\)")
def _mel(feed: Feed, names: list[str], m: re.Match[str]) -> bool:
    return int(m[1]) == feed.knobs["mel"] and "input_features" in names and _set(feed, mel=int(m[2]))


@_on_error(r"nput sequence length \(\d+\) doesn't match model configuration \((\d+)\)")
def _length(feed: Feed, names: list[str], m: re.Match[str]) -> bool:
    return _set(feed, length=int(m[1]))


@_on_error(r"multiple of (\d+)")
def _samples(feed: Feed, names: list[str], m: re.Match[str]) -> bool:
    return "input_values" in names and _set(feed, samples=feed.knobs["samples"] // int(m[1]) * int(m[1]))


@_on_error(r"normalized_shape=\[(\d+)\]")
def _normalized_shape(feed: Feed, names: list[str], m: re.Match[str]) -> bool:
    return "input_features" in names and _set(feed, mel=int(m[1]), features="time, mel")


@_on_error(r"shape '\[-1, (\d+), (\d+)\]' is invalid")
def _codebooks(feed: Feed, names: list[str], m: re.Match[str]) -> bool:
    """Give the decoder one row of input per codebook."""
    return "decoder_input_ids" in names and int(m[2]) == feed.knobs["length"] and _set(feed, rows=int(m[1]))


@_on_error(r"expected 2")
def _cameras(feed: Feed, names: list[str], m: re.Match[str]) -> bool:
    return "pixel_attention_mask" in names and _set(feed, cameras=True, pixels="several")


@_on_error(r"num_hidden_layers|get_seq_length|past_key_values")
def _no_cache(feed: Feed, names: list[str], m: re.Match[str]) -> bool:
    return _add(feed, names, lambda name: name == "use_cache")


@_on_error(r"NoneType")
def _not_optional(feed: Feed, names: list[str], m: re.Match[str]) -> bool:
    """Add an optional argument that turned out to be needed: the first one that may be meant."""
    return _add(
        feed,
        names,
        lambda n: bool(
            re.search(r"mask$|lengths?$|visual_|_sizes$|bbox$|_thw$|^actions|^rewards|returns_to_go|timesteps", n)
        ),
    )


@_on_error(r"")
def _mentioned(feed: Feed, names: list[str], m: re.Match[str]) -> bool:
    """Add an argument that the error mentions."""
    return _add(feed, names, lambda name: name != "labels" and re.search(rf"(?<!\w){name}(?!\w)", m.string) is not None)


def _add(feed: Feed, names: list[str], wanted: Callable[[str], bool]) -> bool:
    new = [n for n in feed.accepts if n not in names and wanted(n) and feed.make(n, torch.Generator()) is not None]
    names += new[:1]
    return bool(new)


def mend(feed: Feed, names: list[str], error: Exception) -> bool:
    """Change the feed or the names according to an error. Return False if nothing is known to do about it."""
    text = " ".join(str(error).split())
    return any((m := re.search(pattern, text)) is not None and change(feed, names, m) for pattern, change in MENDS)


# --- trying -----------------------------------------------------------------------------------------------------------


def find_inputs(model: nn.Module) -> dict[str, Any]:
    """Return inputs on which the model returns floating tensors. Those that use most of the model are tried first.

    The limits are in CPU time, so that they do not depend on what else the machine does.

    Raises:
        NoModel: None of the inputs works, or the time is up.
    """
    errors: list[str] = []
    end = time.process_time() + BUDGET
    for feed, names in attempts(model):
        if time.process_time() > end:
            break
        for _ in range(8):
            arguments = feed(names)
            try:
                with cpu_limit(ONE_TRY), torch.no_grad():
                    torch.manual_seed(0)
                    if any(True for _ in tensors(model(**arguments))):
                        return arguments
                    errors.append("no floating tensor in the output")
                    break
            except Exception as e:
                if not mend(feed, names, e):
                    errors.append(f"{type(e).__name__}: {' '.join(str(e).split())[:150]} ({', '.join(names)})")
                    break
    raise NoModel("forward: " + " | ".join(dict.fromkeys(errors[:1] + errors[-1:])))


def attempts(model: nn.Module) -> Iterator[tuple[Feed, list[str]]]:
    """Yield feeds and names of arguments, in the order in which they are to be tried."""
    first = Feed(model)
    if not first.accepts:
        raise NoModel("its forward takes no argument by name")
    main = getattr(model, "main_input_name", "input_ids")
    main = main if main in first.accepts else (first.required or first.accepts)[0]
    text, decoder, rich = (
        [n for n in names if n in first.accepts] for names in (["input_ids"], ["decoder_input_ids"], RICH)
    )
    sets = [
        [*text, *rich, *decoder], [*text, *rich, "image_sizes", *decoder], [*text, *rich[:1], *decoder],
        [main, *decoder], *([r, *decoder] for r in rich), [main, *text], [main], text, ["inputs_embeds"],
        first.required,
    ]  # fmt: skip
    possible = [[*first.required, *names] for names in sets if names and all(n in first.accepts for n in names)]
    for names in dict.fromkeys(tuple(dict.fromkeys(names)) for names in possible):
        for change in [{}, *_variants(names)]:
            yield Feed(model, **change), list(names)


def _variants(names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield other settings of the knobs that matter for these arguments."""
    if set(IMAGES) & set(names):
        yield from (
            {"pixels": kind}
            for kind in ("several", "video", "volume", "packed", "patches", "tiles", "boxed", "tiled", "one")
        )
        yield from ({"image": (size, size)} for size in (32, 64, 128, 224, 256))
    if {"input_features", "input_values", "spectrogram"} & set(names):
        layouts = ("mel, time", "time, mel")
        yield from ({"time": steps, "features": layout} for steps in (64, 100, 128, 256, 1024) for layout in layouts)
        yield from ({"wave": "channel"}, {"wave": "mel"}, {"features": "1, time, mel"}, {"samples": 16000})
        yield from ({"mel": mel, "features": layout} for mel in (16, 32, 64, 128) for layout in layouts)
    yield from ({"length": 16}, {"length": 64}, {"length": 128}, {"batch": 1})


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield all floating tensors of an output, however it is nested."""
    if isinstance(value, Tensor):
        yield from [value] if value.is_floating_point() else []
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


@contextmanager
def cpu_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError within the body after so many seconds of CPU time, where signals can do that."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGPROF"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s of CPU time")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
