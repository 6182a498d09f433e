"""diffusers, run live: its own loaders read what save and convert wrote, and its models then compute what ours do."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lorainject as li

from models import randomize

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers warns of what its next version changes

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT, POOLED = torch.linspace(-1, 1, 60).view(1, 5, 12), torch.linspace(-1, 1, 10).view(1, 10)


def unet() -> nn.Module:
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
        attention_head_dim=2, **blocks,
    )  # fmt: skip


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
    )  # fmt: skip


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def run_unet(model: nn.Module) -> Tensor:
    return model(torch.linspace(-1, 1, 256).view(1, 4, 8, 8), 3, TEXT).sample


def run_sd3(model: nn.Module) -> Tensor:
    image = torch.linspace(-1, 1, 256).view(1, 4, 8, 8)
    return model(image, encoder_hidden_states=TEXT, pooled_projections=POOLED, timestep=torch.tensor([3])).sample


def run_flux(model: nn.Module) -> Tensor:
    ids = torch.arange(18.0).view(6, 3), torch.zeros(5, 3)
    image = torch.linspace(-1, 1, 24).view(1, 6, 4)
    return model(image, encoder_hidden_states=TEXT, pooled_projections=POOLED, timestep=torch.tensor([0.3]),
                 img_ids=ids[0], txt_ids=ids[1]).sample  # fmt: skip


MODELS: dict[str, tuple[str, Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "unet": ("unet", unet, run_unet),
    "sd3": ("transformer", sd3, run_sd3),
    "flux": ("transformer", flux, run_flux),
}


@pytest.fixture(params=MODELS)
def case(request):
    return MODELS[request.param]


def adapted(build: Callable[[], nn.Module], **settings: object) -> tuple[nn.Module, nn.Module]:
    """Return a base and a copy of it that carries an adapter with random A and B."""
    torch.manual_seed(0)
    base = build().eval()
    model = li.inject(copy.deepcopy(base), TARGETS, **{"r": 3, "alpha": 5} | settings)
    randomize(model)
    return base, model


def require_equal(run: Callable[[nn.Module], Tensor], model: nn.Module, theirs: nn.Module, base: nn.Module) -> None:
    """Assert that both models compute the same, and something else than the base."""
    with torch.no_grad():
        expected = run(model)
        assert (expected - run(base)).abs().max() > 1e-3
        assert (run(theirs) - expected).abs().max() < 1e-5


RANKS = {"one rank": {}, "two ranks": {"overrides": {"to_k": {"r": 2, "alpha": 7}}}}


@pytest.mark.parametrize("settings", RANKS.values(), ids=RANKS)
def test_diffusers_reads_the_format_diffusers(case, settings, tmp_path):
    """Saved, converted to the format diffusers and read by diffusers, an adapter gives the output that it gave here."""
    component, build, run = case
    base, model = adapted(build, **settings)
    li.save(model, tmp_path / "own")
    li.convert(tmp_path / "own", tmp_path / "a", format="diffusers", hints=li.Hints(component=component))
    theirs = copy.deepcopy(base)
    theirs.load_lora_adapter(str(tmp_path / "a"), prefix=component, weight_name="pytorch_lora_weights.safetensors")
    require_equal(run, model, theirs, base)
    again = li.load(copy.deepcopy(base), tmp_path / "a", hints=li.Hints(component=component))
    require_equal(run, model, again, base)


PIPELINES = {"unet": "StableDiffusion", "sd3": "SD3", "flux": "Flux"}


@pytest.mark.parametrize("name", MODELS)
def test_pipelines_of_diffusers_read_the_format_diffusers(name, tmp_path):
    """The loader of the pipeline, which tells formats apart and translates names, finds every site."""
    component, build, run = MODELS[name]
    base, model = adapted(build)
    li.save(model, tmp_path / "own")
    li.convert(tmp_path / "own", tmp_path / "a", format="diffusers", hints=li.Hints(component=component))
    theirs = load_by_pipeline(PIPELINES[name], tmp_path / "a" / "pytorch_lora_weights.safetensors", component, base)
    require_equal(run, model, theirs, base)


def test_pipelines_of_diffusers_read_the_format_kohya(tmp_path):
    """The same for the flat names of a U-Net."""
    base, model = adapted(unet)
    li.save(model, tmp_path / "own")
    path = tmp_path / "a.safetensors"
    li.convert(tmp_path / "own", path, format="kohya", hints=li.Hints(component="unet"))
    require_equal(run_unet, model, load_by_pipeline("StableDiffusion", path, "unet", base), base)


def load_by_pipeline(pipeline: str, path: Path, component: str, base: nn.Module) -> nn.Module:
    """Return a copy of the base with the adapter, as `pipeline.load_lora_weights` puts it there."""
    mixin = getattr(diffusers.loaders, f"{pipeline}LoraLoaderMixin")
    model = copy.deepcopy(base)
    about = {"unet_config": model.config} if component == "unet" else {}
    with_alphas = {"return_alphas": True} if pipeline == "Flux" else {}
    tensors, *alphas, metadata = mixin.lora_state_dict(
        str(path.parent), weight_name=path.name, return_lora_metadata=True, **about, **with_alphas
    )
    load = getattr(mixin, f"load_lora_into_{component}")
    load(tensors, **{component: model, "metadata": metadata}, **({"network_alphas": alphas[0]} if alphas else {}))
    return model


def test_what_save_wrote_is_pefts_layout(case, tmp_path):
    """All sites are layers that are called, so that the folder has PEFT's config, and PEFT reads it."""
    peft = pytest.importorskip("peft")
    _, build, run = case
    base, model = adapted(build)
    config = json.loads((li.save(model, tmp_path / "a") / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    require_equal(run, model, peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a")), base)


def test_what_diffusers_wrote_loads(case, tmp_path):
    """An adapter that diffusers added and saved gives the same output here."""
    peft = pytest.importorskip("peft")
    component, build, run = case
    torch.manual_seed(0)
    base = build().eval()
    theirs = copy.deepcopy(base)
    theirs.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS))
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "lora_" in key:
                p.normal_()
    theirs.save_lora_adapter(str(tmp_path / "a"))
    ours = li.load(copy.deepcopy(base), tmp_path / "a", hints=li.Hints(component=component))
    require_equal(run, theirs, ours, base)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_names_of_transformers_are_refused_for_kohya(name, tmp_path):
    """diffusers would not find them in kohya's spelling, so nothing is written, and the error names a format."""
    _, model = adapted(MODELS[name][1])
    li.save(model, tmp_path / "own")
    path = tmp_path / "a.safetensors"
    with pytest.raises(li.FileError, match=r"no names that diffusers reads .*\n=> write the format diffusers"):
        li.convert(tmp_path / "own", path, format="kohya", hints=li.Hints(component="transformer"))
    assert not path.exists()
