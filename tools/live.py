"""Other libraries read our files, live, and lorainject reads theirs: `scripts/neighbours` prints a table.

Each row runs the library itself on a small model whose weights are zero, so that a merged weight is the update itself.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lorainject as li

HEADS = (4, 2)
LLAMA = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
         "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32),
         "mlp.down_proj": (32, 48)}  # fmt: skip
Row = Callable[[Path], "tuple[float | None, float | None]"]
"""Returns the largest error when the library reads our file, and when we read its file; None if that is not tested."""


def record(weights: Mapping[str, tuple[int, ...]]) -> li.AdapterFile:
    """Return a record on these weights, by path, whose ranks and scales differ by site."""
    g = torch.Generator().manual_seed(0)
    sites = []
    for i, (path, (out, in_)) in enumerate(weights.items()):
        r = 2 + 2 * (i % 2)
        A, B = torch.randn(r, in_, generator=g), torch.randn(out, r, generator=g)
        sites.append(
            li.StoredSite(path=path, A=A, B=B, alpha=3.0 + i % 3, scaling="rslora" if i % 4 == 3 else "standard")
        )
    return li.AdapterFile(path=Path("made"), format="lorainject", sites=tuple(sites))


def llama_record() -> li.AdapterFile:
    return record({f"model.layers.{i}.{leaf}": shape for i in range(2) for leaf, shape in LLAMA.items()})


def deltas(file: li.AdapterFile) -> dict[str, Tensor]:
    return {s.path: s.scale * s.B.double() @ s.A.double() for s in file.sites}


def max_error(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest difference of an element. A tensor that is only on one side is compared with zero."""
    zero = torch.zeros(())
    return max(
        float((tensors.get(k, zero).double() - expected.get(k, zero).double()).abs().max())
        for k in tensors.keys() | expected.keys()
    )


def zeroed(model: nn.Module) -> nn.Module:
    """Set all parameters to zero, and return the model."""
    for p in model.parameters():
        p.data.zero_()
    return model


def nonzero_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are not all zero, by the path of their module."""
    return {name.removesuffix(".weight"): p.data for name, p in model.named_parameters() if p.any()}


def llama_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return zeroed(LlamaForCausalLM(config))


def peft(folder: Path) -> tuple[float, float]:
    from peft import PeftModel

    file = llama_record()
    li.write(file, folder / "ours", format="peft")
    model = PeftModel.from_pretrained(llama_model(), folder / "ours")
    model.save_pretrained(folder / "theirs")
    back = max_error(deltas(li.read(folder / "theirs")), deltas(file))
    return max_error(nonzero_weights(model.merge_and_unload()), deltas(file)), back


def transformers(folder: Path) -> tuple[float, None]:
    file = llama_record()
    li.write(file, folder / "ours", engine="transformers")
    model = llama_model()
    model.load_adapter(str(folder / "ours"))
    updates = {}
    for name, m in model.named_modules():
        if hasattr(m, "lora_A"):
            updates[name] = m.scaling["default"] * m.lora_B["default"].weight.data @ m.lora_A["default"].weight.data
    return max_error(updates, deltas(file)), None


def loralib(folder: Path) -> tuple[float, float]:
    import loralib as lora

    file = record({"0": (8, 6), "1": (4, 8)})
    done = li.write(file, folder / "a.pt", format="loralib")
    layers = [lora.Linear(s.A.shape[1], len(s.B), r=s.r, lora_alpha=s.alpha) for s in done.file.sites]
    model = zeroed(nn.Sequential(*layers))
    model.load_state_dict(torch.load(folder / "a.pt", weights_only=True), strict=False)
    torch.save(lora.lora_state_dict(model), folder / "b.pt")
    back = li.read(folder / "b.pt", allow_pickle=True, hints=li.Hints(alpha=done.file.sites[0].alpha))
    updates = {str(i): m.weight.data for i, m in enumerate(model.eval())}  # eval folds
    return max_error(updates, deltas(file)), max_error(deltas(back), deltas(file))


def lycoris(folder: Path) -> tuple[float, float]:
    from lycoris import create_lycoris_from_weights
    from lycoris.wrapper import LycorisNetwork
    from safetensors.torch import save_file

    LycorisNetwork.LORA_PREFIX = "lora_unet"
    model = zeroed(nn.ModuleDict({"down": nn.ModuleDict({"to_q": nn.Linear(6, 8), "to_k": nn.Linear(6, 4)})}))
    file = record({"down.to_q": (8, 6), "down.to_k": (4, 6)})
    li.write(file, folder / "a.safetensors", format="kohya", hints=li.Hints(component="unet"))
    network, _ = create_lycoris_from_weights(1.0, str(folder / "a.safetensors"), model)
    network.apply_to()  # only then they are its own
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / "b.safetensors")
    back = li.read(folder / "b.safetensors", hints=li.Hints(component="unet", model=model))
    network.merge_to(1.0)
    return max_error(nonzero_weights(model), deltas(file)), max_error(deltas(back), deltas(file))


def diffusers(folder: Path) -> tuple[float, float]:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    def unet() -> nn.Module:
        return zeroed(
            UNet2DConditionModel(
                block_out_channels=(8, 16),
                layers_per_block=1,
                sample_size=8,
                norm_num_groups=4,
                cross_attention_dim=12,
                attention_head_dim=4,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            )
        )

    model = unet()
    file = record(
        {n: tuple(m.weight.shape) for n, m in model.named_modules() if n.endswith(("to_q", "to_v", "to_out.0"))}
    )
    li.write(file, folder / "ours", format="diffusers", hints=li.Hints(component="unet"))
    tensors, metadata = StableDiffusionPipeline.lora_state_dict(str(folder / "ours"), return_lora_metadata=True)[::2]
    model.load_lora_adapter(tensors, prefix="unet", metadata=metadata, adapter_name="default")
    about = _collate_lora_metadata({"unet": model})
    StableDiffusionPipeline.save_lora_weights(
        str(folder / "theirs"), unet_lora_layers=get_peft_model_state_dict(model, adapter_name="default"), **about
    )
    back = li.read(folder / "theirs", hints=li.Hints(component="unet"))
    model.fuse_lora()
    updates = {k.replace(".base_layer", ""): t for k, t in nonzero_weights(model).items() if ".lora_" not in k}
    return max_error(updates, deltas(file)), max_error(deltas(back), deltas(file))


def kohya_tensors(sizes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Return the tensors of a kohya file of rank 2, with an adapter on a weight (out, in) under each name."""
    tensors = {}
    for name, (out, in_) in sizes.items():
        tensors |= {
            f"{name}.lora_down.weight": torch.randn(2, in_),
            f"{name}.lora_up.weight": torch.randn(out, 2),
            f"{name}.alpha": torch.tensor(3.0),
        }
    return tensors


def original_unet(folder: Path) -> tuple[None, float]:
    """Compare what diffusers and lorainject read of a file on SDXL's U-Net under Stability's names."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    def unet() -> nn.Module:
        return zeroed(
            UNet2DConditionModel(
                block_out_channels=(8, 16, 16),
                layers_per_block=2,
                sample_size=8,
                norm_num_groups=4,
                cross_attention_dim=12,
                attention_head_dim=4,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            )
        )

    blocks = (
        "input_blocks_4_1",
        "input_blocks_5_1",
        "input_blocks_7_1",
        "middle_block_1",
        "output_blocks_0_1",
        "output_blocks_4_1",
    )
    tensors = kohya_tensors(
        {
            f"lora_unet_{block}_transformer_blocks_0_attn1_{leaf}": (16, 16)
            for block in blocks
            for leaf in ("to_q", "to_out_0")
        }
    )
    save_file(tensors, folder / "sai.safetensors")
    model = unet()
    updates, alphas = StableDiffusionXLPipeline.lora_state_dict(
        str(folder / "sai.safetensors"), unet_config=model.config
    )
    StableDiffusionXLPipeline.load_lora_into_unet(updates, alphas, model)
    model.fuse_lora()
    theirs = {k.replace(".base_layer", ""): t for k, t in nonzero_weights(model).items() if ".lora_" not in k}
    loaded = li.load(unet(), folder / "sai.safetensors")
    return None, max_error({path: d for path, _, d in li.deltas(loaded)}, theirs)


def original_flux(folder: Path) -> tuple[None, float]:
    """Compare what diffusers and lorainject read of a file on Flux under its own names, with fused weights."""
    from diffusers import FluxPipeline

    d = 3072
    names = {
        "double_blocks_0_img_attn_qkv": 3, "double_blocks_1_txt_attn_qkv": 3, "single_blocks_0_linear1": 7,
        "single_blocks_1_linear2": 1, "double_blocks_0_img_mlp_0": 4, "double_blocks_0_txt_attn_proj": 1,
        "double_blocks_0_img_mod_lin": 6,
    }  # fmt: skip
    save_file(
        kohya_tensors({f"lora_unet_{name}": (n * d, 4) for name, n in names.items()}), folder / "flux.safetensors"
    )
    updates = FluxPipeline.lora_state_dict(str(folder / "flux.safetensors"))
    paths = {key.removesuffix(".lora_A.weight") for key in updates if key.endswith(".lora_A.weight")}
    theirs = {
        k.removeprefix("transformer."): updates[f"{k}.lora_B.weight"].double() @ updates[f"{k}.lora_A.weight"].double()
        for k in paths
    }
    model = nn.Module()
    for path, delta in theirs.items():
        owner = model
        for name in path.split(".")[:-1]:
            owner = owner._modules.setdefault(name, nn.Module())  # type: ignore[assignment]
        owner.add_module(path.rpartition(".")[2], zeroed(nn.Linear(delta.shape[1], delta.shape[0], bias=False)))
    return None, max_error({path: d for path, _, d in li.deltas(li.load(model, folder / "flux.safetensors"))}, theirs)


def mlx(folder: Path) -> tuple[float, float]:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.utils import load_adapters

    file = llama_record()
    li.write(file, folder / "ours", format="mlx")
    model = Model(
        ModelArgs(
            model_type="llama",
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            vocab_size=64,
        )
    )
    model = load_adapters(model, str(folder / "ours"))
    updates = {
        name: torch.tensor((m.scale * (m.lora_b.T @ m.lora_a.T)).tolist())
        for name, m in model.named_modules()
        if hasattr(m, "lora_a")
    }
    (folder / "theirs").mkdir()
    mx.save_safetensors(
        str(folder / "theirs" / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters()))
    )
    (folder / "theirs" / "adapter_config.json").write_bytes((folder / "ours" / "adapter_config.json").read_bytes())
    tensors = {k: v for k, v in mx.load(str(folder / "theirs" / "adapters.safetensors")).items() if "lora" in k}
    mx.save_safetensors(str(folder / "theirs" / "adapters.safetensors"), tensors)
    return max_error(updates, deltas(file)), max_error(deltas(li.read(folder / "theirs")), deltas(file))


def litgpt(folder: Path) -> tuple[float, float]:
    from litgpt.lora import GPT, Config, lora_filter, merge_lora_weights

    file = llama_record()
    done = li.write(file, folder / "ours", format="litgpt", hints=li.Hints(heads=HEADS))
    s = done.file.sites[0]
    on = dict.fromkeys(("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp"), True)
    config = Config(
        n_layer=2,
        n_embd=32,
        n_head=4,
        n_query_groups=2,
        intermediate_size=48,
        vocab_size=64,
        padded_vocab_size=64,
        mlp_class_name="LLaMAMLP",
        bias=False,
        norm_class_name="RMSNorm",
        lora_r=s.r,
        lora_alpha=s.alpha,
        **on,
    )
    model = zeroed(GPT(config))
    model.load_state_dict(torch.load(folder / "ours" / "lit_model.pth.lora", weights_only=True)["model"], strict=False)
    (folder / "theirs").mkdir()
    torch.save(
        {"model": {k: v for k, v in model.state_dict().items() if lora_filter(k, v)}},
        folder / "theirs" / "lit_model.pth.lora",
    )
    (folder / "theirs" / "hyperparameters.yaml").write_bytes((folder / "ours" / "hyperparameters.yaml").read_bytes())
    back = li.read(folder / "theirs", allow_pickle=True, hints=li.Hints(heads=HEADS))
    merge_lora_weights(model)
    names = {
        "attn.proj": "self_attn.o_proj",
        "mlp.fc_1": "mlp.gate_proj",
        "mlp.fc_2": "mlp.up_proj",
        "mlp.proj": "mlp.down_proj",
    }
    updates = {}
    for i, block in enumerate(model.transformer.h):
        rows = dict(zip("qkv", block.attn.qkv.linear.weight.data.split([32, 16, 16]), strict=True))
        updates |= {f"model.layers.{i}.self_attn.{part}_proj": w for part, w in rows.items()}
        updates |= {
            f"model.layers.{i}.{ours}": block.get_submodule(theirs).linear.weight.data for theirs, ours in names.items()
        }
    return max_error(updates, deltas(file)), max_error(deltas(back), deltas(file))


def torchtune(folder: Path) -> tuple[float, None]:
    import importlib.util

    where = importlib.metadata.distribution("torchtune").locate_file("torchtune/models/convert_weights.py")
    spec = importlib.util.spec_from_file_location("convert_weights", where)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    file = llama_record()
    done = li.write(file, folder / "a.pt", format="torchtune", hints=li.Hints(heads=HEADS))
    tensors = torch.load(folder / "a.pt", weights_only=True)
    theirs = module.tune_to_peft_adapter_weights(tensors, num_heads=4, num_kv_heads=2, dim=32, head_dim=8)
    s, pre = done.file.sites[0], "base_model.model."
    updates = {
        k.removeprefix(pre).removesuffix(".lora_A.weight"): s.scale
        * theirs[k.replace("lora_A", "lora_B")].double()
        @ A.double()
        for k, A in theirs.items()
        if ".lora_A." in k
    }
    return max_error(updates, deltas(file)), None


def onnxruntime(folder: Path) -> tuple[float, None]:
    import onnxruntime as ort

    file = record({"model.layers.0.attn.q_proj": (8, 6), "model.layers.0.attn.v_proj": (4, 6)})
    li.write(file, folder / "a.onnx_adapter", format="onnx")
    ort.LoraAdapter().Load(str(folder / "a.onnx_adapter"))
    t = {
        k: torch.from_numpy(v.numpy().copy()).double()
        for k, v in ort.AdapterFormat.read_adapter(str(folder / "a.onnx_adapter")).get_parameters().items()
    }
    updates = {
        k.removesuffix(".lora_A.weight"): (A @ t[k.replace("lora_A", "lora_B")]).T
        for k, A in t.items()
        if "lora_A" in k
    }
    return max_error(updates, deltas(file)), None


def adapters(folder: Path) -> tuple[float, float]:
    import adapters as hub
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = zeroed(BertModel(config))
    paths = {f"encoder.layer.{i}.attention.self.{leaf}": (32, 32) for i in range(2) for leaf in ("query", "value")}
    file = record(paths)
    li.write(file, folder / "ours", format="adapterhub", hints=li.Hints(model=model))
    hub.init(model)
    name = model.load_adapter(str(folder / "ours"), set_active=True, use_safetensors=True)
    model.save_adapter(str(folder / "theirs"), name)
    back = li.read(folder / "theirs", allow_pickle=True)
    model.merge_adapter(name)
    updates = {k: t for k, t in nonzero_weights(model).items() if ".loras." not in k}
    return max_error(updates, deltas(file)), max_error(deltas(back), deltas(file))


ROWS: tuple[tuple[str, str, Row], ...] = (
    ("peft", "peft", peft),
    ("transformers", "transformers", transformers),
    ("loralib", "loralib", loralib),
    ("lycoris-lora", "kohya", lycoris),
    ("diffusers", "diffusers", diffusers),
    ("diffusers", "kohya, SDXL's own names", original_unet),
    ("diffusers", "kohya, Flux's own names", original_flux),
    ("mlx-lm", "mlx", mlx),
    ("litgpt", "litgpt", litgpt),
    ("torchtune", "torchtune", torchtune),
    ("onnxruntime", "onnx", onnxruntime),
    ("adapters", "adapterhub", adapters),
)


def main() -> None:
    """Print one row per library that is installed here, and exit with an error if a difference is above 1e-4."""
    warnings.simplefilter("ignore")
    rows, failures = [], 0
    for library, format, row in ROWS:
        try:
            version = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
        if library == "transformers" and not version.startswith("5."):
            continue  # in the environment of `adapters`, which has no PEFT
        with tempfile.TemporaryDirectory() as folder:
            try:
                cells = ["-" if e is None else f"{e:.1e}" for e in row(Path(folder))]
                failures += any(e is not None and e != "-" and float(e) > 1e-4 for e in cells)
            except Exception as e:
                cells = [f"{type(e).__name__}: {str(e).partition(chr(10))[0][:90]}", ""]
                failures += 1
        rows.append(f"| {library} {version} | {format} | {cells[0]} | {cells[1]} |")
    print("\n".join(rows))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
