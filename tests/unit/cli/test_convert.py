"""`genstream convert`: what comes in comes out; what does not fit is refused and nothing is written."""

import hashlib
import json
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from genstream.cli.__main__ import main
from genstream.io.hub_card import MODEL_PLACE
from genstream.pipelines import folders
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler
from genstream.streaming.presets import PRESETS, find_preset
from genstream.transformer.causal_dit import CausalDiT
from genstream.transformer.conversion import wan_names
from genstream.transformer.umt5 import umt5_places, umt5_tensors
from genstream.vae.tiny import TinyVideoVAE
from genstream.vae.wan import WanVideoVAE

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
WAN_CONFIG = {"_class_name": "WanModel", "dim": 24, "num_heads": 2, "num_layers": 2, "text_len": 12}
LINEAR = "blocks.1.self_attn.q"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CausalDiT(**CONFIG).eval().requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def wan(model):
    """The model's weights under the published names."""
    ours = model.state_dict()
    return {f"model.{wan}": ours[name] for wan, name in wan_names(CONFIG).items()}


@pytest.fixture
def source(wan, tmp_path):
    """A published file, with its configuration beside it."""
    folder = tmp_path / "published"
    folder.mkdir()
    save_file(wan, folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps(WAN_CONFIG))
    return folder / "weights.safetensors"


@pytest.fixture
def vae(tmp_path):
    torch.manual_seed(1)
    widths = (4, 4, 4, 4)
    vae = TinyVideoVAE(latent_channels=16, encoder_width=4, decoder_widths=widths, first_frame_copies=3)
    vae.save_pretrained(tmp_path / "tiny_vae")
    return tmp_path / "tiny_vae"


def convert(*arguments: object) -> None:
    assert main(["convert", *map(str, arguments)]) == 0


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    files = folder.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def check_same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = weights_of(folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


class ExactTimesteps(torch.nn.Module):
    """The sinusoid of diffusers' model, in float64."""

    def forward(self, timestep):
        frequencies = torch.exp(-torch.arange(8, dtype=torch.float64) * torch.log(torch.tensor(1e4)) / 8)
        angles = timestep.double()[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def velocity(model, **arguments):
    torch.manual_seed(2)
    latents, prompt = torch.randn(2, 16, 3, 4, 6), torch.randn(2, 12, 16)
    with torch.no_grad():
        return model(latents, torch.tensor([1000, 317]), prompt, **arguments).sample


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    """A folder of diffusers' own model with random weights, and what it computes."""
    torch.manual_seed(3)
    theirs = diffusers.WanTransformer3DModel(**CONFIG).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("diffusers")
    theirs.save_pretrained(folder, max_shard_size="20KB")
    theirs.condition_embedder.timesteps_proj = ExactTimesteps()
    return folder, velocity(theirs)


def test_diffusers_model_gives_the_same_velocity(wan_folder, tmp_path):
    folder, expected = wan_folder
    convert(folder, "-o", tmp_path / "model")
    ours = CausalDiT.from_pretrained(tmp_path / "model" / "transformer").eval()
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(velocity(ours), expected, rtol=0, atol=1e-5)


def test_there_and_back(wan_folder, tmp_path):
    folder, _ = wan_folder
    convert(folder, "-o", tmp_path / "ours")
    convert(tmp_path / "ours", "-o", tmp_path / "theirs", "--to", "diffusers")
    check_same(tmp_path / "theirs", weights_of(folder))
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "theirs"))
    assert after == {name: value for name, value in before.items() if name != "_name_or_path"}
    _, loading = diffusers.WanTransformer3DModel.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not any(loading.values())


@pytest.mark.parametrize("form", ["file", "folder", "shards"])
def test_every_form_of_the_source_gives_the_same(model, wan, source, tmp_path, form):
    names = sorted(wan)
    if form == "shards":
        source.unlink()
        parts = [names[::2], names[1::2]]
        index = {name: f"part{number}.safetensors" for number, part in enumerate(parts) for name in part}
        for number, part in enumerate(parts):
            save_file({name: wan[name] for name in part}, source.parent / f"part{number}.safetensors")
        (source.parent / "a.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    convert(source if form == "file" else source.parent, "-o", tmp_path / "out", "--max-shard-gb", 1e-5)
    check_same(tmp_path / "out" / "transformer", model.state_dict())
    loaded = CausalDiT.from_pretrained(tmp_path / "out" / "transformer")
    torch.testing.assert_close(velocity(loaded), velocity(model), rtol=0, atol=0)


def test_dtype(model, source, tmp_path):
    convert(source, "-o", tmp_path / "out", "--dtype", "bfloat16")
    stored = weights_of(tmp_path / "out" / "transformer")
    loaded = CausalDiT.from_pretrained(tmp_path / "out" / "transformer", torch_dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32, torch.bfloat16}
    for name, tensor in loaded.state_dict().items():
        assert stored[name].dtype == tensor.dtype
        torch.testing.assert_close(stored[name], model.state_dict()[name].to(tensor.dtype), rtol=0, atol=0)


def test_a_whole_model_runs(source, vae, pipe, tmp_path):
    """Parts of two folders are put together and give the same as the objects do."""
    pipe.save_pretrained(tmp_path / "other")
    convert(source, "-o", tmp_path / "out", "--vae", vae, "--text-encoder", tmp_path / "other")
    loaded = CausalVideoPipeline.from_pretrained(tmp_path / "out")
    assert loaded.config.text_tokens == WAN_CONFIG["text_len"]
    built = CausalVideoPipeline(
        tokenizer=pipe.tokenizer,
        text_encoder=pipe.text_encoder,
        transformer=CausalDiT.from_pretrained(tmp_path / "out" / "transformer"),
        vae=TinyVideoVAE.from_pretrained(vae),
        scheduler=loaded.scheduler,
        text_tokens=12,
    )
    request = {"prompt": "a red circle", "height": 32, "width": 48, "num_frames": 9, "output_type": "pt"}
    torch.testing.assert_close(loaded(**request).frames, built(**request).frames, rtol=0, atol=0)
    for name in ("text_encoder", "tokenizer"):
        for file in (tmp_path / "other" / name).iterdir():
            assert (tmp_path / "out" / name / file.name).read_bytes() == file.read_bytes()


def test_a_converted_folder_can_be_completed(source, vae, pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "other")
    convert(source, "-o", tmp_path / "first", "--license", "apache-2.0")
    with pytest.raises(ValueError, match=r"has no vae: give vae=.*convert .*first --vae PATH"):
        CausalVideoPipeline.from_pretrained(tmp_path / "first")
    alone = CausalVideoPipeline.from_pretrained(tmp_path / "first", vae=TinyVideoVAE.from_pretrained(vae))
    with pytest.raises(ValueError, match="--text-encoder PATH"):
        alone.encode_prompt("a red circle")
    index = json.loads((tmp_path / "first" / "model_index.json").read_text())
    (tmp_path / "first" / "model_index.json").write_text(json.dumps(index | {"window_frames": 9}))
    convert(tmp_path / "first", "-o", tmp_path / "second", "--vae", vae)
    convert(tmp_path / "second", "-o", tmp_path / "third", "--text-encoder", tmp_path / "other")
    pipe = CausalVideoPipeline.from_pretrained(tmp_path / "third")
    assert pipe.config.window_frames == 9
    assert pipe.encode_prompt("a red circle").shape == (1, 12, 16)
    card = (tmp_path / "third" / "README.md").read_text()
    assert hashlib.sha256(source.read_bytes()).hexdigest() in card
    assert ModelCard(card).data.license == "apache-2.0"


def test_vae_from_a_published_file(source, tmp_path):
    torch.manual_seed(4)
    vae = WanVideoVAE(encoder_widths=(4,) * 5, decoder_widths=(4,) * 5).eval()
    save_file(vae.state_dict(), tmp_path / "Wan2.1_VAE.safetensors")
    convert(source, "-o", tmp_path / "out", "--vae", tmp_path / "Wan2.1_VAE.safetensors")
    loaded = CausalVideoPipeline.from_pretrained(tmp_path / "out")
    latents = torch.randn(1, 16, 2, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(loaded.vae.decode(latents), vae.decode(latents), rtol=0, atol=0)


def lora(rank: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    layers = {LINEAR: (24, 24), "blocks.0.ffn.0": (32, 24)}
    return {
        f"base_model.model.{name}.{part}.weight": torch.randn(shape)
        for name, (out, inner) in layers.items()
        for part, shape in (("lora_A", (rank, inner)), ("lora_B", (out, rank)))
    }


def test_merged_lora(model, wan, source, tmp_path):
    save_file(lora(), tmp_path / "lora.safetensors")
    convert(source, "-o", tmp_path / "out", "--lora", tmp_path / "lora.safetensors", "--lora-alpha", 1.5)
    expected = dict(wan)
    for name in (LINEAR, "blocks.0.ffn.0"):
        up, down = (lora()[f"base_model.model.{name}.{part}.weight"] for part in ("lora_B", "lora_A"))
        expected[f"model.{name}.weight"] = wan[f"model.{name}.weight"] + 0.5 * up @ down
    renamed = {ours: expected[f"model.{name}"] for name, ours in wan_names(CONFIG).items()}
    check_same(tmp_path / "out" / "transformer", renamed)


def test_alpha_beside_the_lora(source, tmp_path):
    save_file(lora(), tmp_path / "lora.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 1.5}))
    options = ("--lora", tmp_path / "lora.safetensors")
    convert(source, "-o", tmp_path / "told", *options)
    (tmp_path / "adapter_config.json").unlink()
    convert(source, "-o", tmp_path / "given", *options, "--lora-alpha", 1.5)
    check_same(tmp_path / "told" / "transformer", weights_of(tmp_path / "given" / "transformer"))


def test_a_kept_lora_tells_its_alpha(source, tmp_path, capsys):
    save_file(lora(), tmp_path / "lora.safetensors")
    options = ("--lora", tmp_path / "lora.safetensors", "--lora-alpha", 1.5)
    convert(source, "-o", tmp_path / "kept", *options, "--lora-mode", "adapter")
    convert(source, "-o", tmp_path / "given", *options)
    adapter = ("--lora", tmp_path / "kept" / "lora" / "pytorch_lora_weights.safetensors")
    convert(source, "-o", tmp_path / "told", *adapter)
    check_same(tmp_path / "told" / "transformer", weights_of(tmp_path / "given" / "transformer"))
    capsys.readouterr()
    words = ["convert", source, "-o", tmp_path / "no", *adapter, "--lora-alpha", 7]
    assert main([str(word) for word in words]) == 2
    assert "lora_alpha (--lora-alpha) must be 1.5, as the LoRA says, got 7" in capsys.readouterr().err


def test_patterns_of_alphas(source, tmp_path):
    save_file(lora(), tmp_path / "lora.safetensors")
    config = {"r": 3, "lora_alpha": 9.0, "alpha_pattern": {"ffn.0": 1.5, "self_attn.q": 1.5}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    convert(source, "-o", tmp_path / "told", "--lora", tmp_path / "lora.safetensors")
    (tmp_path / "adapter_config.json").unlink()
    options = ("--lora", tmp_path / "lora.safetensors", "--lora-alpha", 1.5)
    convert(source, "-o", tmp_path / "given", *options)
    check_same(tmp_path / "told" / "transformer", weights_of(tmp_path / "given" / "transformer"))


def test_kept_lora_acts_as_the_merged_one(source, tmp_path):
    pytest.importorskip("peft")
    save_file(lora(), tmp_path / "lora.safetensors")
    options = (source, "--lora", tmp_path / "lora.safetensors", "--lora-alpha", 1.5)
    convert(*options, "-o", tmp_path / "merged")
    convert(*options, "-o", tmp_path / "kept", "--lora-mode", "adapter")
    merged, kept = (CausalDiT.from_pretrained(tmp_path / name / "transformer") for name in ("merged", "kept"))
    card = (tmp_path / "kept" / "README.md").read_text()
    assert f'load_lora_weights("{MODEL_PLACE}/lora")' in card
    base = velocity(kept)
    kept.load_lora_adapter(tmp_path / "kept" / "lora", use_safetensors=True)
    torch.testing.assert_close(velocity(kept), velocity(merged), rtol=1e-4, atol=1e-5)
    assert (velocity(kept) - base).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["genstream", "diffusers"])
def test_a_kept_lora_goes_along(source, vae, tmp_path, capsys, kind):
    save_file(lora(), tmp_path / "lora.safetensors")
    given = ("--lora", tmp_path / "lora.safetensors", "--lora-alpha", 3)
    convert(source, "-o", tmp_path / "first", *given, "--lora-mode", "adapter")
    capsys.readouterr()
    convert(tmp_path / "first", "-o", tmp_path / "second", "--to", kind)
    assert "LoRA kept as lora/" in capsys.readouterr().out
    path = Path("lora") / "pytorch_lora_weights.safetensors"
    assert (tmp_path / "second" / path).read_bytes() == (tmp_path / "first" / path).read_bytes()
    card = (tmp_path / "second" / "README.md").read_text()
    assert f'("{MODEL_PLACE}/lora"' in card.partition("## Licence")[0]
    convert(tmp_path / "first", "-o", tmp_path / "merged", *given)
    assert not (tmp_path / "merged" / "lora").exists()


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if not preset.takes_image])
def test_presets(source, vae, tmp_path, name):
    convert(source, "-o", tmp_path / "out", "--vae", vae, "--preset", name)
    pipe = CausalVideoPipeline.from_pretrained(tmp_path / "out")
    expected = find_preset(name)
    assert pipe.settings == expected.settings
    scheduler = FewStepScheduler(steps=expected.steps, shift=expected.shift, warped=expected.warped)
    assert pipe.scheduler.timesteps.tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("said", ["given", "card", "text", "nowhere"])
def test_licence_and_origin_are_in_the_card(source, tmp_path, said):
    options, name = (), None
    if said == "given":
        options, name = ("--license", "mit"), "mit"
    elif said == "card":
        (source.parent / "README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\nWeights.\n")
        name = "cc-by-nc-sa-4.0"
    elif said == "text":
        (source.parent / "LICENSE.txt").write_text("Do as you like.")
        name = "other"
    convert(source, "-o", tmp_path / "out", *options)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == name
    assert hashlib.sha256(source.read_bytes()).hexdigest() in card.text
    assert ("Not known" in card.text) == (said == "nowhere")
    assert (tmp_path / "out" / "LICENSE").is_file() == (said == "text")


@pytest.mark.parametrize("own", ["mit", "cc-by-nc-sa-4.0"])
def test_the_licence_of_a_lora_is_told_too(source, tmp_path, own):
    other = "cc-by-nc-sa-4.0"
    (tmp_path / "lora").mkdir()
    save_file(lora(), tmp_path / "lora" / "lora.safetensors")
    (tmp_path / "lora" / "README.md").write_text(f"---\nlicense: {other}\n---\nWeights.\n")
    options = ("--lora", tmp_path / "lora" / "lora.safetensors", "--lora-alpha", 3, "--license", own)
    convert(source, "-o", tmp_path / "out", *options)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == (own if own == other else "other")
    rows = [row for row in card.text.splitlines() if row.startswith("| ")]
    assert any(row.startswith("| transformer") and f"| {own} |" in row for row in rows)
    assert any(row.startswith("| LoRA") and f"| {other} |" in row for row in rows)
    assert (f"Several: {own} for the transformer; for other parts {other}" in card.text) == (own != other)


def test_push_to_hub(source, vae, tmp_path, monkeypatch):
    save_file(lora(), tmp_path / "lora.safetensors")
    kept = ("--lora", tmp_path / "lora.safetensors", "--lora-alpha", 3, "--lora-mode", "adapter")
    convert(source, "-o", tmp_path / "out", "--vae", vae, "--license", "mit", *kept)
    pipe = CausalVideoPipeline.from_pretrained(tmp_path / "out")
    pushed = {}

    class Repository:
        repo_id = "me/model"

    def upload(*, repo_id, folder_path, **others):
        pushed["id"] = repo_id
        pushed["card"] = ModelCard.load(Path(folder_path) / "README.md")
        pushed["adapter"] = weights_of(Path(folder_path) / "lora")
        pushed["transformer"] = weights_of(Path(folder_path) / "transformer")
        return "https://hub/me/model"

    monkeypatch.setattr(folders, "create_repo", lambda *given, **others: Repository)
    monkeypatch.setattr(folders, "upload_folder", upload)
    assert pipe.push_to_hub("me/model") == "https://hub/me/model"
    assert pushed["id"] == "me/model"
    assert pushed["card"].data.license == "mit"
    assert hashlib.sha256(source.read_bytes()).hexdigest() in pushed["card"].text
    assert len(pushed["adapter"]) == len(lora())
    assert pushed["transformer"].keys() == pipe.transformer.state_dict().keys()


def test_a_saved_model_tells_what_was_changed_since_it_was_loaded(source, vae, tmp_path, capsys):
    pytest.importorskip("peft")
    save_file(lora(), tmp_path / "lora.safetensors")
    kept = ("--lora", tmp_path / "lora.safetensors", "--lora-alpha", 3, "--lora-mode", "adapter")
    convert(source, "-o", tmp_path / "out", "--vae", vae, *kept)

    def saved(change):
        pipe = CausalVideoPipeline.from_pretrained(tmp_path / "out")
        change(pipe)
        folder = tmp_path / change.__name__
        pipe.save_pretrained(folder)
        return folder, (folder / "README.md").read_text()

    def nothing(pipe):
        pass

    def preset(pipe):
        pipe.apply_preset("krea")

    def fused(pipe):
        pipe.load_lora_weights(tmp_path / "out" / "lora")
        pipe.fuse_lora()
        pipe.unload_lora_weights()

    assert saved(nothing)[1] == (tmp_path / "out" / "README.md").read_text()
    folder, card = saved(preset)
    assert "- `window_frames` is 3, it was 18" in card and "- `steps` is [1000.0, 750.0" in card
    assert (folder / "lora").is_dir() and "load_lora_weights" in card
    folder, card = saved(fused)
    assert "- LoRAs fused into the transformer: default_0" in card
    # Loaded again it would act twice.
    assert not (folder / "lora").exists() and "load_lora_weights" not in card


def test_an_adapter_stays_unless_it_is_the_one_that_was_fused(source, vae, tmp_path):
    pytest.importorskip("peft")
    save_file(lora(), tmp_path / "lora.safetensors")
    kept = ("--lora", tmp_path / "lora.safetensors", "--lora-alpha", 3, "--lora-mode", "adapter")
    convert(source, "-o", tmp_path / "out", "--vae", vae, *kept)

    def fused(path):
        pipe = CausalVideoPipeline.from_pretrained(tmp_path / "out")
        pipe.load_lora_weights(path)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        return pipe

    foreign = fused(tmp_path / "lora.safetensors")
    for _ in range(2):
        foreign.save_pretrained(tmp_path / "foreign")
    card = (tmp_path / "foreign" / "README.md").read_text()
    assert (tmp_path / "foreign" / "lora").is_dir() and "load_lora_weights" in card
    foreign.save_pretrained(tmp_path / "out")  # in place, and the adapter there is another one
    foreign.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text().count("LoRAs fused into the transformer") == 1
    own = fused(tmp_path / "out" / "lora" / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=r"save_directory must be another folder: .*lora' is fused"):
        own.save_pretrained(tmp_path / "out")


def test_saving_to_the_hub_takes_the_card_along(source, vae, tmp_path, monkeypatch):
    convert(source, "-o", tmp_path / "out", "--vae", vae, "--license", "mit")
    pushed = []

    class Repository:
        repo_id = "me/model"

    def upload(*, repo_id, folder_path, **others):
        pushed.append((repo_id, ModelCard.load(Path(folder_path) / "README.md").data.license))

    monkeypatch.setattr(folders, "create_repo", lambda *given, **others: Repository)
    monkeypatch.setattr(folders, "upload_folder", upload)
    pipe = CausalVideoPipeline.from_pretrained(tmp_path / "out")
    pipe.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="me/model")
    assert pushed == [("me/model", "mit")]


def test_parts_that_are_a_variant_are_taken_under_plain_names(source, vae, tmp_path, capsys):
    convert(source, "-o", tmp_path / "out", "--vae", vae)
    CausalVideoPipeline.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "half", variant="fp16")
    convert(tmp_path / "half", "-o", tmp_path / "again")
    names = {path.name for path in (tmp_path / "again").rglob("*.safetensors")}
    assert names == {"diffusion_pytorch_model.safetensors"}
    CausalVideoPipeline.from_pretrained(tmp_path / "again")


def test_a_student_of_diffusers_says_that_it_needs_its_preset(source, tmp_path, capsys):
    convert(source, "-o", tmp_path / "ours", "--preset", "self-forcing")
    assert "converting back needs --preset" not in capsys.readouterr().out
    convert(tmp_path / "ours", "-o", tmp_path / "theirs", "--to", "diffusers")
    assert "a model of diffusers tells no way to stream: converting back needs --preset" in (
        capsys.readouterr().out
    )


def test_a_model_type_that_the_tensors_contradict(source, tmp_path, capsys):
    config = json.loads((source.parent / "config.json").read_text())
    (source.parent / "config.json").write_text(json.dumps({**config, "model_type": "i2v"}))
    told = "config says model_type 'i2v', but the tensors take no image channels"
    check_refused(capsys, [source, "-o", tmp_path / "out"], "weights.safetensors", told)


def check_refused(capsys, arguments: list[object], *parts: str) -> None:
    """One line that names what is wrong, and no trace on the disk."""
    output = Path(str(arguments[-1])).parent
    before = sorted(output.iterdir())
    assert main(["convert", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.out == ""
    for part in parts:
        assert part in captured.err
    assert sorted(output.iterdir()) == before


BLOCK = f"model.{LINEAR}.weight"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda weights: weights.pop(BLOCK), [f"lacks '{LINEAR}.weight'", "weights.safetensors"]),
        (lambda weights: weights.update(extra=torch.ones(1)), ["holds 'extra'", "weights.safetensors"]),
        (lambda weights: weights.update({BLOCK: torch.ones(24, 23)}), [LINEAR, "[24, 24]", "[24, 23]"]),
        (lambda weights: weights.update({BLOCK: torch.full((24, 24), torch.nan)}), ["NaN", "attn1.to_q"]),
        (lambda weights: weights.update({BLOCK: torch.ones(24, 24).int()}), [LINEAR, "float32", "I32"]),
        (lambda weights: weights.update({"net." + BLOCK: torch.ones(24, 24)}), [LINEAR, "twice"]),
        (lambda weights: weights.clear(), ["lacks 'patch_embedding.weight'", "no tensors"]),
    ],
)
def test_wrong_weights(wan, source, tmp_path, capsys, change, parts):
    weights = dict(wan)
    change(weights)
    save_file(weights, source)
    check_refused(capsys, [source, "-o", tmp_path / "out"], *parts)


def rewrite_header(path: Path, change) -> None:
    """Change the header of a safetensors file, which gets the length of the new one."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda header: [], ["its header is no object"]),
        (lambda header: header | {"x": "text"}, ["damaged header", "'x' is 'text'"]),
        (lambda header: header | {"x": {"dtype": "F32", "shape": [1]}}, ["damaged header", "'x'"]),
        (
            lambda header: header | {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
            ["damaged header", "'x'"],
        ),
        (
            lambda header: header | {"x": {"dtype": "F32", "shape": [24, 24], "data_offsets": [0, 4]}},
            ["'x'", "must take 2304 bytes", "[24, 24] of F32", "gives it 4"],
        ),
    ],
)
def test_a_damaged_header(source, tmp_path, capsys, change, parts):
    rewrite_header(source, change)
    check_refused(capsys, [source, "-o", tmp_path / "out"], *parts)


@pytest.mark.parametrize("index", [{}, {"weight_map": ["a"]}, []])
def test_a_damaged_shard_index(source, tmp_path, capsys, index):
    (source.parent / "weights.safetensors.index.json").write_text(json.dumps(index))
    check_refused(capsys, [source.parent, "-o", tmp_path / "out"], "index.json")


def test_a_card_that_is_not_valid(source, tmp_path, capsys):
    (source.parent / "README.md").write_text("---\nlicense: [mit\n---\n")
    check_refused(capsys, [source, "-o", tmp_path / "out"], "README.md", "valid yaml")


def test_shards_without_end(source, tmp_path, capsys):
    command = [source, "-o", tmp_path / "out", "--max-shard-gb", "inf"]
    check_refused(capsys, command, "--max-shard-gb", "got inf")


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_parts_are_whole(source, vae, pipe, tmp_path, capsys, part):
    """Both when they are taken over and when they are loaded."""
    pipe.save_pretrained(tmp_path / "other")
    options = ["--vae", vae, "--text-encoder", tmp_path / "other"]
    convert(source, "-o", tmp_path / "whole", *options)
    place = vae if part == "vae" else tmp_path / "other" / part
    for folder in (place, tmp_path / "whole" / part):
        (path,) = folder.glob("*.safetensors")
        weights = load_file(path)
        name = sorted(weights)[1]
        save_file({key: weight for key, weight in weights.items() if key != name}, path)
    capsys.readouterr()
    check_refused(capsys, [source, "-o", tmp_path / "out", *options], "lacks", name)
    with pytest.raises(ValueError, match=rf"{part}.*lacks '{name}'"):
        CausalVideoPipeline.from_pretrained(tmp_path / "whole")


@pytest.mark.parametrize("size", [0, 5, 500, -1])
def test_a_file_that_is_cut_off(source, tmp_path, capsys, size):
    source.write_bytes(source.read_bytes()[:size])
    check_refused(capsys, [source, "-o", tmp_path / "out"], "weights.safetensors", "cut off")


@pytest.mark.parametrize(
    ("wrong", "parts"),
    [
        ({"num_layers": 3}, ["num_layers 3", "2"]),
        ({"ffn_dim": 64}, ["ffn_dim 64", "32", "'blocks.0.ffn.0.weight'", "[32, 24]"]),
        ({"dim": 48}, ["attention_head_dim 24", "12", "patch_embedding.weight"]),
        ({"in_dim": 36}, ["in_channels 36", "[24, 16, 1, 2, 2]"]),
        ({"num_heads": 5}, ["divide the width 24, got 5"]),
        ({"num_heads": 0}, ["num_heads 0", "above 0"]),
        ({"dim": None}, ["dim None", "above 0"]),
        ({"eps": -1.0}, ["eps -1.0", "above 0"]),
        ({"text_len": "512"}, ["text_len '512'", "whole number"]),
        ({"text_len": 0}, ["text_len 0", "at least 1"]),
    ],
)
def test_a_configuration_that_contradicts_the_tensors(source, tmp_path, capsys, wrong, parts):
    (source.parent / "config.json").write_text(json.dumps(WAN_CONFIG | wrong))
    check_refused(capsys, [source, "-o", tmp_path / "out"], *parts)


def test_a_configuration_of_something_else_is_told(source, tmp_path, capsys):
    (source.parent / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    check_refused(capsys, [source, "-o", tmp_path / "out"], "--heads", "width 24")
    convert(source, "-o", tmp_path / "out", "--heads", 2)
    assert "describes AutoencoderKLWan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("weights", "options", "parts"),
    [
        (lora(), [], ["--lora-alpha", "rank 3"]),
        (
            {name.replace("blocks.1", "blocks.7"): tensor for name, tensor in lora().items()},
            ["--lora-alpha", "3"],
            ["'blocks.7.self_attn.q'", "does not have", "lora.safetensors"],
        ),
        (
            {name: tensor[..., :5].contiguous() for name, tensor in lora().items()},
            ["--lora-alpha", "3"],
            ["[32, 24]", "[3, 5]", "[32, 3]"],
        ),
        ({"a": torch.ones(1)}, ["--lora-alpha", "3"], ["lora_A", "'a'"]),
        (lora(), ["--lora-alpha", "nan"], ["--lora-alpha", "above 0", "nan"]),
        (lora(rank=0), ["--lora-alpha", "3"], ["rank of at least 1", "[0, "]),
    ],
)
def test_wrong_lora(source, tmp_path, capsys, weights, options, parts):
    path = tmp_path / "lora.safetensors"
    save_file(weights, path)
    check_refused(capsys, [source, "--lora", path, *options, "-o", tmp_path / "out"], *parts)


def test_parts_that_do_not_fit(source, vae, pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "other")
    output = ["-o", tmp_path / "out"]
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "other"
    capsys.readouterr()
    check_refused(capsys, [source, "--vae", other, *output], "vae must have latent_channels 16", "got 4")
    check_refused(capsys, [source, "--vae", empty, *output], "--vae", "empty")
    check_refused(capsys, [source, "--text-encoder", empty, *output], "--text-encoder", "empty")
    encoder = other / "text_encoder"
    check_refused(
        capsys, [source, "--text-encoder", encoder, "--tokenizer", empty, *output], "--tokenizer", "empty"
    )
    weights = next(vae.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-9])
    check_refused(capsys, [source, "--vae", vae, *output], "cut off", str(weights))
    weights.rename(weights.with_suffix(".bin"))
    check_refused(capsys, [source, "--vae", vae, *output], str(vae), "no .safetensors file")


def test_bad_usage(source, tmp_path, capsys):
    output = ["-o", tmp_path / "out"]
    check_refused(capsys, [source.parent / "nothing.pt", *output], "nothing.pt", "does not exist")
    check_refused(capsys, [source, "--preset", "fast", *output], "preset", "'fast'")
    check_refused(capsys, [source, "--preset", "motionstream", *output], "image-to-video", "got 16")
    check_refused(capsys, [source, "--max-shard-gb", "0", *output], "max_shard_gb", "0")
    check_refused(capsys, [source, "--to", "diffusers", "--vae", source, *output], "vae", "diffusers")
    check_refused(capsys, [source, "--heads", "3", *output], "heads (--heads) must be 2", "got 3")
    check_refused(capsys, [source, "--weights", "ema", *output], "--weights", "'ema'")
    check_refused(capsys, [source, "--lora-alpha", "3", *output], "--lora-alpha", "--lora")
    check_refused(capsys, [source, "--lora-mode", "adapter", *output], "--lora-mode", "needs a lora")
    check_refused(capsys, [source, "--tokenizer", source.parent, *output], "--tokenizer", "needs a text enc")
    check_refused(capsys, [source, "-o", source.parent], "new or an empty folder")
    assert main(["convert", str(source), "-o", str(tmp_path / "no" / "where")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_the_folder_of_the_original_model(source, pipe, tmp_path, capsys):
    """Its text encoder, tokenizer and VAE are found in it, in torch files."""
    folder = source.parent
    ours = pipe.text_encoder.state_dict()
    published = {
        theirs: ours[name]
        for name, theirs in umt5_places(*_published_text_encoder(pipe.text_encoder.config)).items()
    }
    torch.save(published, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    pipe.tokenizer.save_pretrained(folder / "google" / "umt5-xxl")
    torch.manual_seed(4)
    vae = WanVideoVAE(encoder_widths=(4,) * 5, decoder_widths=(4,) * 5)
    torch.save(vae.state_dict(), folder / "Wan2.1_VAE.pth")
    convert(folder, "-o", tmp_path / "out")
    loaded = CausalVideoPipeline.from_pretrained(tmp_path / "out")
    prompt = "a red circle"
    torch.testing.assert_close(loaded.encode_prompt(prompt), pipe.encode_prompt(prompt), rtol=0, atol=0)
    latents = torch.randn(1, 16, 1, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(loaded.vae.decode(latents), vae.eval().decode(latents), rtol=0, atol=0)
    assert "took vae (WanVideoVAE)" in capsys.readouterr().out


def _published_text_encoder(config):
    """Names and shapes of the published file for transformers' configuration, and that for the map."""
    arguments = {
        name: getattr(config, name)
        for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    } | {"relative_attention_num_buckets": config.relative_attention_num_buckets}
    return {theirs: shape for theirs, (_, shape) in umt5_tensors(arguments).items()}, arguments


@pytest.mark.parametrize("preset", [None, "longlive"])
def test_another_pipeline_stays_the_many_step_model_that_it_is(source, vae, tmp_path, capsys, preset):
    convert(source, "-o", tmp_path / "first", "--vae", vae)
    index = json.loads((tmp_path / "first" / "model_index.json").read_text())
    index |= {"_class_name": "WanPipeline", "scheduler": ["diffusers", "UniPCMultistepScheduler"]}
    (tmp_path / "first" / "model_index.json").write_text(json.dumps(index))
    scheduler = diffusers.UniPCMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True)
    scheduler.save_pretrained(tmp_path / "first" / "scheduler")
    options = () if preset is None else ("--preset", preset)
    convert(tmp_path / "first", "-o", tmp_path / "second", *options)
    pipe = CausalVideoPipeline.from_pretrained(tmp_path / "second")
    told = capsys.readouterr().out
    if preset is None:
        assert (
            "in 50 steps at shift 3 with guidance 5, as its UniPCMultistepScheduler is no student's" in told
        )
        assert (pipe.settings.chunk_frames, pipe.settings.window_frames) == (21, 0)
        assert (pipe.scheduler.config.shift, len(pipe.scheduler.schedule().timesteps)) == (3.0, 50)
        assert pipe.settings.guidance_scale == 5.0
    else:
        assert pipe.settings == find_preset(preset).settings


def test_original_weights_stay_many_step_models(wan, vae, tmp_path, capsys):
    folder = tmp_path / "Wan"
    folder.mkdir()
    save_file({name.removeprefix("model."): weight for name, weight in wan.items()}, folder / "a.safetensors")
    (folder / "config.json").write_text(json.dumps(WAN_CONFIG))
    convert(folder, "-o", tmp_path / "out", "--vae", vae)
    assert "in 50 steps at shift 5 with guidance 5, as nothing tells that" in capsys.readouterr().out
    pipe = CausalVideoPipeline.from_pretrained(tmp_path / "out")
    assert len(pipe.scheduler.schedule().timesteps) == 50
    convert(tmp_path / "out", "-o", tmp_path / "later", "--preset", "causvid")
    later = CausalVideoPipeline.from_pretrained(tmp_path / "later")
    assert later.settings == find_preset("causvid").settings
    convert(folder, "-o", tmp_path / "student", "--vae", vae, "--preset", "causvid")
    pipe = CausalVideoPipeline.from_pretrained(tmp_path / "student")
    assert pipe.settings == find_preset("causvid").settings


@pytest.mark.parametrize("name", ["generator", "generator_ema"])
def test_a_generator_is_a_student_without_prefixes_too(wan, tmp_path, capsys, name):
    bare = {name.removeprefix("model."): weight for name, weight in wan.items()}
    torch.save({name: bare}, tmp_path / "student.pt")
    (tmp_path / "config.json").write_text(json.dumps(WAN_CONFIG))
    convert(tmp_path / "student.pt", "-o", tmp_path / "out")
    assert "streams by the preset 'self-forcing', as none was given" in capsys.readouterr().out


def test_a_folder_with_a_lora_tells_its_alpha(source, tmp_path, capsys):
    folder = tmp_path / "lora"
    folder.mkdir()
    save_file(lora(), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 16}))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 5}))  # of something else
    convert(source, "-o", tmp_path / "file", "--lora", folder / "adapter_model.safetensors")
    convert(source, "-o", tmp_path / "folder", "--lora", folder)
    first, second = (
        load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("file", "folder")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    capsys.readouterr()
    command = [source, "--lora", folder, "--lora-alpha", 4, "-o", tmp_path / "out"]
    check_refused(capsys, command, "must be 16, as the LoRA says, got 4")


def test_a_vae_with_nan_is_refused(source, tmp_path, capsys):
    vae = WanVideoVAE(encoder_widths=(4,) * 5, decoder_widths=(4,) * 5)
    weights = vae.state_dict()
    next(iter(weights.values())).view(-1)[0] = torch.nan
    torch.save(weights, tmp_path / "Wan2.1_VAE.pth")
    command = [source, "--vae", tmp_path / "Wan2.1_VAE.pth", "-o", tmp_path / "out"]
    check_refused(capsys, command, "Wan2.1_VAE.pth", "must be finite, got NaN")


def test_an_empty_licence_is_refused(source, tmp_path, capsys):
    check_refused(capsys, [source, "--license", " ", "-o", tmp_path / "out"], "license (--license)", "a name")


def test_a_preset_of_other_chunks_is_refused(source, vae, tmp_path, capsys):
    convert(source, "-o", tmp_path / "first", "--vae", vae)
    path = tmp_path / "first" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chunk_frames": 1}))
    capsys.readouterr()
    command = [tmp_path / "first", "-o", tmp_path / "out", "--preset", "longlive"]
    check_refused(capsys, command, "3 latent frames at a time", "trained for 1")


def test_the_card_loads_in_the_precision_of_the_weights(source, vae, tmp_path):
    convert(source, "-o", tmp_path / "half", "--vae", vae, "--dtype", "bfloat16")
    convert(source, "-o", tmp_path / "full", "--vae", vae)
    assert ", dtype=torch.bfloat16)" in (tmp_path / "half" / "README.md").read_text()
    assert "dtype=" not in (tmp_path / "full" / "README.md").read_text()


def test_a_lora_in_place_of_a_kept_one_is_told(source, tmp_path, capsys):
    save_file(lora(), tmp_path / "lora.safetensors")
    given = ("--lora", tmp_path / "lora.safetensors", "--lora-alpha", 3)
    convert(source, "-o", tmp_path / "first", *given, "--lora-mode", "adapter")
    capsys.readouterr()
    convert(tmp_path / "first", "-o", tmp_path / "second", *given)
    assert "left out of first: its own LoRA" in capsys.readouterr().out


def test_a_lora_under_flat_names(source, tmp_path):
    save_file(lora(), tmp_path / "lora.safetensors")
    flat = {}
    for name, weight in lora().items():
        layer, part, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
        part = {"lora_A": "lora_down", "lora_B": "lora_up"}[part]
        flat[f"lora_unet_{layer.replace('.', '_')}.{part}.weight"] = weight
    save_file(flat, tmp_path / "flat.safetensors")
    for name in ("lora", "flat"):
        path = tmp_path / f"{name}.safetensors"
        convert(source, "-o", tmp_path / name, "--lora", path, "--lora-alpha", 3)
    assert weights_of(tmp_path / "flat" / "transformer").keys()
    check_same(tmp_path / "flat" / "transformer", weights_of(tmp_path / "lora" / "transformer"))


def test_the_tokenizer_stays_as_its_file_has_it(source, pipe, tmp_path):
    """Published ones name T5's class, which would build another one from the same file."""
    pipe.save_pretrained(tmp_path / "other")
    pieces = ["<pad>", "</s>", "<s>", "<unk>", "\u2581", "\u2581red", "a", "b"]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    vocabulary = [(piece, -1.0 - place / 1000) for place, piece in enumerate([*pieces, *bytes_])]
    stored = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=True))
    stored.pre_tokenizer = pre_tokenizers.Metaspace()
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    stored.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "T5Tokenizer", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    options = ("--text-encoder", tmp_path / "other", "--tokenizer", folder)
    convert(source, "-o", tmp_path / "out", *options)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    _, kind = index["tokenizer"]
    loaded = getattr(transformers, kind).from_pretrained(tmp_path / "out" / "tokenizer")
    text = "red \u00e9ab"
    assert loaded(text, add_special_tokens=False).input_ids == stored.encode(text).ids


def test_parts_that_the_pipeline_does_not_take_are_told(source, vae, tmp_path, capsys):
    convert(source, "-o", tmp_path / "first", "--vae", vae)
    index = json.loads((tmp_path / "first" / "model_index.json").read_text())
    index |= {"_class_name": "WanPipeline", "safety_checker": ["transformers", "CLIPVisionModel"]}
    (tmp_path / "first" / "safety_checker").mkdir()
    (tmp_path / "first" / "model_index.json").write_text(json.dumps(index))
    convert(tmp_path / "first", "-o", tmp_path / "second")
    assert "left out of first: 'safety_checker'" in capsys.readouterr().out
    assert not (tmp_path / "second" / "safety_checker").exists()
