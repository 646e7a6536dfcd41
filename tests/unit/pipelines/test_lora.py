"""LoRAs of a pipeline: files, and streams that share the weights but not the LoRA."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from genstream.streaming.controls import LoraControl, PromptControl, from_json, to_json
from genstream.streaming.settings import RecachePolicy
from genstream.transformer.adapters import LoraUse, active_loras

RED, BLUE = "a red circle moving right", "a blue square moving left"


@pytest.fixture(scope="module")
def styled(build_pipeline, build_lora):
    """A pipeline with the LoRAs "one" and "two" loaded and none in use."""
    pipe = build_pipeline(guidance_scale=2.0)
    pipe.load_lora_weights(build_lora(pipe.transformer), "one")
    pipe.load_lora_weights(build_lora(pipe.transformer, seed=1), "two")
    pipe.disable_lora()
    return pipe


def latents(pipe, state, chunks=3):
    return torch.cat([pipe.step(state).latents for _ in range(chunks)], dim=2)


def stream(pipe, *controls, loras=None, chunks=3):
    """Latents of an endless stream; `controls` are pairs of a frame and a control."""
    request = pipe.request(RED, seed=3)
    state = pipe.start(request if loras is None else replace(request, loras=loras))
    for frame, control in controls:
        state.submit(control, not_before=frame)
    return latents(pipe, state, chunks)


@pytest.mark.parametrize("source", ["file", "folder", "peft folder", "saved", "tensors"])
def test_sources(build_pipeline, build_lora, tmp_path, source):
    pipe = build_pipeline()
    tensors = build_lora(pipe.transformer)
    plain = pipe(RED, num_frames=9, output_type="latent").frames
    pipe.load_lora_weights(tensors, "style")
    pipe.set_adapters("style", 1.5)
    expected = pipe(RED, num_frames=9, output_type="latent").frames
    assert not torch.allclose(expected, plain, atol=1e-3)
    match source:
        case "saved":
            pipe.transformer.save_lora_adapter(tmp_path, "style")
        case "peft folder":
            save_file(tensors, tmp_path / "adapter_model.safetensors")
            (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 3}))
        case _:
            save_file(tensors, tmp_path / "style.safetensors")
    given = {"file": tmp_path / "style.safetensors", "tensors": tensors}.get(source, str(tmp_path))
    other = build_pipeline()
    other.load_lora_weights(given, "style")
    if source != "peft folder":  # there, alpha 3 with rank 2 makes up for it
        other.set_adapters("style", 1.5)
    torch.testing.assert_close(other(RED, num_frames=9, output_type="latent").frames, expected)


def test_a_stream_takes_over_what_is_in_use(styled):
    plain = stream(styled)
    for loras in ((LoraUse(name="one"),), (LoraUse(name="two", scale=0.5), LoraUse(name="one", scale=0.25))):
        styled.enable_lora()
        styled.set_adapters([lora.name for lora in loras], [lora.scale for lora in loras])
        request = styled.request(RED, seed=3)
        styled.disable_lora()
        assert {lora.name: lora.scale for lora in request.loras} == {lora.name: lora.scale for lora in loras}
        found = latents(styled, styled.start(request))
        torch.testing.assert_close(found, stream(styled, loras=loras), rtol=0, atol=1e-5)
        assert not torch.allclose(found, plain, atol=1e-3)
    assert torch.equal(stream(styled), plain)


def test_streams_on_the_same_weights_keep_their_loras(styled):
    choices = [(), (LoraUse(name="one"),), (LoraUse(name="two", scale=0.7),)]
    expected = [stream(styled, loras=loras) for loras in choices]
    request = styled.request(RED, seed=3)
    states = [styled.start(replace(request, loras=loras)) for loras in choices]
    chunks = [[styled.step(state).latents for state in states] for _ in range(3)]
    for found, alone in zip(zip(*chunks, strict=True), expected, strict=True):
        assert torch.equal(torch.cat(found, dim=2), alone)
    assert active_loras(styled.transformer) == ()


def test_a_control_changes_the_lora_from_its_chunk_on(styled):
    plain = stream(styled)
    switched = stream(styled, (9, LoraControl(name="one", scale=0.8)))
    assert torch.equal(switched[:, :, :3], plain[:, :, :3])
    assert not torch.allclose(switched[:, :, 3:], plain[:, :, 3:], atol=1e-3)
    back = stream(styled, (0, LoraControl(name="one")), (0, LoraControl(name=None)))
    assert torch.equal(back, plain)


def test_a_control_at_the_start_is_a_request_with_that_lora(styled):
    switched = stream(styled, (0, LoraControl(name="two", scale=0.6)))
    assert torch.equal(switched, stream(styled, loras=(LoraUse(name="two", scale=0.6),)))


def test_a_control_may_name_several_loras(styled):
    both = (LoraUse(name="one"), LoraUse(name="two", scale=0.6))
    switched = stream(styled, (0, LoraControl(name=["one", "two"], scale=[1.0, 0.6])))
    assert torch.equal(switched, stream(styled, loras=both))


@pytest.mark.parametrize("engine", ["cache", "queue"])
@pytest.mark.parametrize("context", ["clean", "fused", "last_step", "recompute"])
def test_every_way_to_run_a_model(build_pipeline, build_lora, context, engine):
    """Two streams take turns; one changes its LoRA on the way, and both are as they are alone."""
    if engine == "queue" and context != "clean":
        pytest.skip("the queue engine has one context")
    pipe = build_pipeline(window_frames=6, context=context, engine=engine)
    pipe.load_lora_weights(build_lora(pipe.transformer), "one")
    pipe.disable_lora()

    def begin(loras=()):
        state = pipe.start(replace(pipe.request(RED, seed=3), loras=loras))
        state.submit(LoraControl(name="one" if loras == () else None), not_before=21)
        return state

    loras = (LoraUse(name="one", scale=0.5),)
    alone = [latents(pipe, begin(), 5), latents(pipe, begin(loras), 5)]
    states = [begin(), begin(loras)]
    chunks = [[pipe.step(state).latents for state in states] for _ in range(5)]
    for found, expected in zip(zip(*chunks, strict=True), alone, strict=True):
        assert torch.equal(torch.cat(found, dim=2), expected)


def test_a_waiting_chunk_is_committed_by_the_weights_that_made_it(build_pipeline, build_lora):
    """So that a fused commit stays what a pass of its own would be."""
    found = []
    for context in ("clean", "fused"):
        pipe = build_pipeline(window_frames=6, context=context, recache="nothing")
        pipe.load_lora_weights(build_lora(pipe.transformer), "one")
        pipe.disable_lora()
        found.append(stream(pipe, (9, LoraControl(name="one")), (21, LoraControl(name=None))))
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def test_a_change_reaches_the_past_only_when_recached(styled):
    """Without re-caching, keys and values of the past stay as the old weights made them."""

    def kept(policy):
        state = styled.start(styled.request(RED, seed=3))
        styled.step(state)
        before = [keys.clone() for keys in state.kv.keys]
        state.submit(LoraControl(name="one", recache=policy))
        styled.step(state)
        tokens = 3 * state.kv.shape.tokens_per_frame
        return [
            torch.equal(old[:, :tokens], new[:, :tokens])
            for old, new in zip(before, state.kv.keys, strict=True)
        ]

    assert kept(RecachePolicy.NOTHING) == [True, True]
    assert kept(RecachePolicy.ALL) == [True, False]  # what leads to the first layer's keys has no LoRA


def test_a_change_reaches_the_prompt(styled):
    """A LoRA on cross-attention changes what a prompt means, without re-caching as well."""
    state = styled.start(styled.request(RED, seed=3))
    before = (state.text.text[0][0].clone(), state.negative_text.text[0][0].clone())
    state.submit(LoraControl(name="one", recache=RecachePolicy.NOTHING))
    styled.step(state)
    for old, new in zip(before, (state.text, state.negative_text), strict=True):
        assert not torch.allclose(old, new.text[0][0], atol=1e-3)


def test_a_stream_with_changes_is_replayed_and_restored(styled, tmp_path):
    controls = (
        (9, LoraControl(name="one", scale=0.8)),
        (21, PromptControl(prompt=BLUE)),
        (33, LoraControl(name="two", recache=RecachePolicy.NOTHING)),
        (45, LoraControl(name=None)),
    )
    state = styled.start(styled.request(RED, seed=3))
    for frame, control in controls:
        state.submit(control, not_before=frame)
    expected = []
    for index in range(6):
        expected.append(styled.step(state).latents)
        styled.save_state(state, tmp_path / f"{index}.safetensors")
    assert [item.control for item in state.log] == [control for _, control in controls]
    replayed = styled.start(state.request, state.log)
    assert torch.equal(latents(styled, replayed, 6), torch.cat(expected, dim=2))
    for index in range(5):
        restored = styled.load_state(tmp_path / f"{index}.safetensors")
        rest = latents(styled, restored, 5 - index)
        assert torch.equal(rest, torch.cat(expected[index + 1 :], dim=2))


def test_a_stream_is_restored_with_its_lora_only(styled, build_pipeline, build_lora, tmp_path):
    plain = styled.start(styled.request(RED))
    styled.step(plain)
    styled.save_state(plain, tmp_path / "plain.safetensors")
    state = plain.clone()
    state.submit(LoraControl(name="one"))
    styled.step(state)
    styled.save_state(state, tmp_path / "one.safetensors")
    other = build_pipeline(guidance_scale=2.0)
    other.load_state(tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="LoRA must be one of those loaded, none, got 'one'"):
        other.load_state(tmp_path / "one.safetensors")
    other.load_lora_weights(build_lora(other.transformer, seed=7), "one")
    with pytest.raises(ValueError, match="belongs to another model or dtype, or to another LoRA"):
        other.load_state(tmp_path / "one.safetensors")
    other.delete_adapters("one")
    other.load_lora_weights(build_lora(other.transformer), "one")
    assert other.load_state(tmp_path / "one.safetensors").loras == (LoraUse(name="one"),)


def test_a_model_is_not_saved_with_a_lora_in_its_layers(build_pipeline, build_lora, tmp_path):
    pipe = build_pipeline()
    pipe.load_lora_weights(build_lora(pipe.transformer), "style")
    expected = pipe(RED, num_frames=9, output_type="latent").frames
    with pytest.raises(ValueError, match=r"LoRAs \['style'\] are loaded, .* call unload_lora_weights\(\)"):
        pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "model")
    saved = type(pipe).from_pretrained(tmp_path / "model")
    torch.testing.assert_close(saved(RED, num_frames=9, output_type="latent").frames, expected)


def test_a_lora_that_is_not_loaded_is_refused_and_dropped(styled):
    state = styled.start(styled.request(RED, seed=3))
    state.submit(LoraControl(name="three"))
    with pytest.raises(ValueError, match=r"LoRA must be one of those loaded, \['one', 'two'\], got 'three'"):
        styled.step(state)
    assert torch.equal(latents(styled, state), stream(styled))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (("blocks.1.", "blocks.7."), r"is for 'blocks\.7\..* does not have; .* \[\[2, 24\], \[24, 2\]\]"),
        (("self_attn.q", "self_attn.gate"), r"is for 'blocks\.0\.self_attn\.gate', 'blocks\.1\.self"),
        (("lora_B", "lora_C"), "LoRA must hold lora_A and lora_B tensors only"),
    ],
)
def test_a_lora_for_other_layers_changes_nothing(build_pipeline, build_lora, change, error):
    pipe = build_pipeline()
    tensors = {name.replace(*change): x for name, x in build_lora(pipe.transformer).items()}
    before = list(pipe.transformer.state_dict())
    with pytest.raises(ValueError, match=error):
        pipe.load_lora_weights(tensors, "style")
    assert list(pipe.transformer.state_dict()) == before


def test_a_lora_of_another_width_is_refused(build_pipeline, build_lora):
    pipe = build_pipeline()
    tensors = {
        name: x.repeat(1, 2) if "lora_A" in name else x for name, x in build_lora(pipe.transformer).items()
    }
    with pytest.raises(ValueError, match=r"\[24, 24\], got \[2, 48\] and \[24, 2\]"):
        pipe.load_lora_weights(tensors, "style")


@pytest.mark.parametrize(
    ("name", "error"),
    [("a.b", "letters, digits, - and _, got 'a.b'"), ("one", "must be a new one, got 'one'")],
)
def test_bad_names(styled, build_lora, name, error):
    with pytest.raises(ValueError, match=error):
        styled.load_lora_weights(build_lora(styled.transformer), name)


def test_a_missing_package_is_named(pipe, build_lora, monkeypatch):
    monkeypatch.setattr("genstream.pipelines.lora.is_peft_available", lambda: False)
    with pytest.raises(ImportError, match=r"needs peft: pip install 'genstream\[lora\]'"):
        pipe.load_lora_weights(build_lora(pipe.transformer))


def test_pickles_are_not_read(pipe, tmp_path):
    (tmp_path / "lora.pt").write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"must be a \.safetensors file .*lora\.pt"):
        pipe.load_lora_weights(tmp_path / "lora.pt")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"name": "one", "scale": float("nan")}, "scale of LoRA 'one' must be finite, got nan"),
        ({"name": ["one", "one"]}, r"name must hold each LoRA once, got \['one', 'one'\]"),
        ({"name": ["one", "two"], "scale": [1.0]}, "scale must be one number, or one for each of 2, got 1"),
        ({"name": "one", "recache": True}, "recache must be one of .*, got True"),
        ({"name": None, "scale": 0.5}, r"scale needs the name of a LoRA, got 0\.5"),
    ],
)
def test_bad_control(arguments, error):
    with pytest.raises(ValueError, match=error):
        LoraControl(**arguments)


@pytest.mark.parametrize(
    "control",
    [
        LoraControl(name="one", scale=0.5, recache=RecachePolicy.NOTHING),
        LoraControl(name=("one", "two"), scale=(1.0, 0.5)),
        LoraControl(name=None),
    ],
)
def test_controls_as_json(control):
    assert from_json(json.loads(json.dumps(to_json(control)))) == control


def test_a_lora_with_nan_is_refused(build_pipeline, build_lora):
    pipe = build_pipeline()
    tensors = build_lora(pipe.transformer)
    next(iter(tensors.values()))[0, 0] = float("nan")
    with pytest.raises(ValueError, match="LoRA must be finite, got NaN or infinity in"):
        pipe.load_lora_weights(tensors, "broken")
    assert not getattr(pipe.transformer, "peft_config", {})
