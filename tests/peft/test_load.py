"""load_peft: PEFT's folders give PEFT's logits, and what has no counterpart is refused by name before anything changes."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import lora_lite as ll
from lora_lite.core.checkpoint import serialized
from lora_lite.peft import layout as peft_layout
from lora_lite.peft import selecting
from lora_lite.peft.folder import read_folder
from lora_lite.peft.load import AttachedParts
from lora_lite.testing import toy
from tests.oracles.compat_peft import TOLERANCE, check_import
from tests.oracles.peft_cases import NAMES, distance, gpt2, in_peft, logits, peft, quietly, qwen, randomise, saved

CASES = {
    "lora": lambda t: peft.LoraConfig(r=4, lora_alpha=7, target_modules=t),
    "lora-patterns": lambda t: peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=t, rank_pattern={t[0]: 3}, alpha_pattern={r".*\.0\..*" + t[1]: 11}
    ),
    "rslora": lambda t: peft.LoraConfig(r=4, lora_alpha=7, use_rslora=True, target_modules=t, rank_pattern={t[0]: 3}),
    "dora": lambda t: peft.LoraConfig(r=4, lora_alpha=7, target_modules=t, use_dora=True),
    "ia3": lambda t: peft.IA3Config(target_modules=t, feedforward_modules=[]),
    "ia3-both-sides": lambda t: peft.IA3Config(target_modules=t, feedforward_modules=[t[-1]]),
    "ia3-inputs": lambda t: peft.IA3Config(target_modules=t, feedforward_modules=t),
    "oft": lambda t: peft.OFTConfig(target_modules=t, oft_block_size=8, use_cayley_neumann=False),
    "oft-shared": lambda t: peft.OFTConfig(target_modules=t, oft_block_size=8, use_cayley_neumann=False, block_share=True),
    "hra": lambda t: peft.HRAConfig(target_modules=t, r=4),
    "road-1": lambda t: peft.RoadConfig(target_modules=t, group_size=16, variant="road_1"),
    "road-2": lambda t: peft.RoadConfig(target_modules=t, group_size=8, variant="road_2"),
    "road-4": lambda t: peft.RoadConfig(target_modules=t, group_size=16, variant="road_4"),
    "vera": lambda t: peft.VeraConfig(target_modules=t, r=6),
    "vera-key": lambda t: quietly(peft.VeraConfig, target_modules=t, r=6, save_projection=False, projection_prng_key=5),
    "delora": lambda t: peft.DeloraConfig(target_modules=t, r=4, rank_pattern={t[0]: 3}),
    "loha": lambda t: peft.LoHaConfig(target_modules=t, r=4, alpha=3, alpha_pattern={t[0]: 5}),
    "lokr": lambda t: peft.LoKrConfig(target_modules=t, r=2, alpha=3),
    "lokr-both": lambda t: peft.LoKrConfig(target_modules=t, r=2, alpha=3, decompose_both=True, decompose_factor=8),
}
IN_CONV1D = [case for case in CASES if case.startswith(("lora", "rslora", "dora", "ia3", "vera"))]
EVERYWHERE = [(qwen, case) for case in CASES] + [(gpt2, case) for case in IN_CONV1D]


def folder_of(tmp_path, case="lora", base=qwen, config=None):
    folder = tmp_path / "peft"
    want = saved(base, config or CASES[case](list(NAMES[base])), folder)
    return folder, want


def arrives(folder, want, base=qwen, **options):
    """(model, handle) of a folder that gives these logits here."""
    model = base()
    handle = ll.load_peft(model, folder, **options)
    assert distance(logits(model), want) < TOLERANCE
    return model, handle


@pytest.mark.parametrize(("base", "case"), EVERYWHERE, ids=[f"{base.__name__}-{case}" for base, case in EVERYWHERE])
def test_logits_equal_those_of_peft_and_so_do_they_after_the_way_back(base, case, tmp_path):
    folder, want = folder_of(tmp_path, case, base)
    assert distance(logits(base()), want) > 0.02
    model, _ = arrives(folder, want, base)
    written = ll.export_peft(model, tmp_path / "back")
    assert written.rank is None, "not in PEFT's own form"
    assert distance(in_peft(base, tmp_path / "back"), want) < TOLERANCE


@pytest.mark.parametrize("variant", ll.names())
def test_what_peft_trains_on_after_our_export_comes_back(variant):
    assert check_import(variant) == ("yes" if variant in peft_layout.layouts() else "refused: no form of PEFT's own")


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r".*\.(q|k)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "mlp.up_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.0\.self_attn\.k_proj"},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_layers_are_those_that_peft_selects(fields, tmp_path):
    folder, want = folder_of(tmp_path, config=peft.LoraConfig(r=2, **fields))
    config = json.loads((folder / "adapter_config.json").read_text())
    if fields["target_modules"] == "all-linear":  # PEFT resolves it when it saves
        config["target_modules"] = "all-linear"
        (folder / "adapter_config.json").write_text(json.dumps(config))
    arrives(folder, want)


def test_selection_follows_the_rule_of_peft_on_awkward_paths():
    from peft.tuners.tuners_utils import check_target_module_exists

    paths = ["fc", "a.fc", "afc", "layers.0.fc", "m.layers.0.fc", "m.layers.1.experts.0.fc", "h.2.x.fc", "m.h.2.fc", "m.10.fc"]
    fields = [
        {"target_modules": names, "layers_to_transform": blocks, "layers_pattern": pattern, "exclude_modules": exclude}
        for names in (["fc"], ["0.fc", "a.fc"], r".*fc")
        for blocks in (None, 0, [1, 2])
        for pattern in (None, "h", ["layers", "h"])
        for exclude in (None, ["x.fc"], r".*\.0\.fc")
        if not (isinstance(names, str) and (blocks is not None or pattern)) and not (pattern and blocks is None)
    ]
    for options in fields:
        config = peft.LoraConfig(**options)
        for path in paths:
            assert selecting.targeted(options, path) == bool(check_target_module_exists(config, path)), (options, path)


def test_loading_draws_nothing_and_keeps_a_checkpoint_of_ours(tmp_path):
    folder, want = folder_of(tmp_path)
    model, state = qwen(), torch.get_rng_state()
    handle = ll.load_peft(model, folder, name="style")
    assert torch.equal(torch.get_rng_state(), state)
    assert handle.name == "style"
    handle.save(tmp_path / "a.safetensors")
    fresh = qwen()
    ll.load(fresh, tmp_path / "a.safetensors")
    assert distance(logits(fresh), want) < TOLERANCE
    handle.detach()
    assert torch.equal(logits(model), logits(qwen()))


def test_a_folder_of_both_sides_is_two_adapters_with_one_handle(tmp_path):
    folder, want = folder_of(tmp_path, "ia3-both-sides")
    model, handle = arrives(folder, want, name="style")
    assert isinstance(handle, AttachedParts)
    assert [part.name for part in handle.parts] == ["style", "style_2"]
    assert len(handle.layers) == 6
    assert len(list(handle.parameters())) == 6
    with handle.scale(0.0):
        assert torch.equal(logits(model), logits(qwen()))
    assert distance(logits(model), want) < TOLERANCE  # after the coefficient came back
    with pytest.raises(ll.LoraLiteError, match=r'became 2 adapters(?s:.)*name="style"'):
        handle.save(tmp_path / "a.safetensors")
    for part in handle.parts:
        part.save(tmp_path / f"{part.name}.safetensors")
    with handle:
        pass
    assert torch.equal(logits(model), logits(qwen()))
    for name in ("style", "style_2"):
        ll.load(model, tmp_path / f"{name}.safetensors")
    assert distance(logits(model), want) < TOLERANCE


def test_dropout_is_reported_and_left_out(tmp_path):
    folder, want = folder_of(tmp_path, config=peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"]))
    with pytest.warns(ll.LoraLiteWarning, match=r"lora_dropout=0.1"):
        arrives(folder, want)


def test_a_series_that_has_converged_is_a_rotation_and_one_that_has_not_is_refused(tmp_path):
    model = quietly(peft.get_peft_model, qwen(), peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8)).eval()
    for size, folder in ((1e-3, tmp_path / "small"), (0.1, tmp_path / "large")):
        randomise(model, size)
        quietly(model.save_pretrained, folder)
        if size < 0.01:
            arrives(folder, logits(model))
    with pytest.raises(ll.LoraLiteError, match=r"use_cayley_neumann=True: .* away from a rotation"):
        ll.load_peft(qwen(), folder)


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 7])
def test_series_is_that_of_peft(terms):
    from lora_lite.mathematics.rotations import skew
    from lora_lite.peft.layouts.oft import series

    module = peft.tuners.oft.layer.OFTRotationModule(3, 28, 8, 24, num_cayley_neumann_terms=terms)
    q = 0.3 * toy.inputs(3, 28)
    want = module._cayley_batch(q, 8, True, terms)
    assert distance(series(skew(q, 8), terms), want) < 1e-6


def test_a_start_that_rewrote_the_base_is_refused_and_its_conversion_is_not(tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=["q_proj"])
    model = quietly(peft.get_peft_model, qwen(), config).eval()
    model.peft_config["default"].init_lora_weights = True
    quietly(model.save_pretrained, tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    randomise(model)
    want = logits(model)
    quietly(model.save_pretrained, tmp_path / "rewritten")
    with pytest.raises(ll.LoraLiteError, match=r"init_lora_weights='pissa'(?s:.)*path_initial_model_for_weight_conversion"):
        ll.load_peft(qwen(), tmp_path / "rewritten")
    quietly(model.save_pretrained, tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    arrives(tmp_path / "converted", want)


REFUSED = {
    "lora_bias=True": peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True),
    "bias='all'": peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all"),
    "modules_to_save=": peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "has no place": peft.LoraConfig(r=2, target_modules=["embed_tokens"]),
    "coft=True": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8, coft=True, use_cayley_neumann=False),
    "apply_GS=True": peft.HRAConfig(r=4, target_modules=["q_proj"], apply_GS=True),
    "r=3 is odd": peft.HRAConfig(r=3, target_modules=["q_proj"]),
    "no counterpart of PEFT's C3A": peft.C3AConfig(block_size=8, target_modules=["q_proj"]),
    "the config and the layer say": peft.OFTConfig(
        target_modules=["q_proj", "down_proj"], oft_block_size=0, r=4, use_cayley_neumann=False
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_counterpart_is_refused_by_name(message, tmp_path):
    folder, _ = folder_of(tmp_path, config=REFUSED[message])
    assert_refused(folder, message)


def assert_refused(folder, message):
    model = qwen()
    flags = {k: p.requires_grad for k, p in model.named_parameters()}
    keys, want = list(model.state_dict()), logits(model)
    with pytest.raises(ll.LoraLiteError) as caught:
        ll.load_peft(model, folder)
    assert message in str(caught.value), caught.value
    assert list(model.state_dict()) == keys
    assert {k: p.requires_grad for k, p in model.named_parameters()} == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(logits(model), want)


def edit(folder: Path, **changes):
    file = folder / "adapter_config.json"
    options = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in options.items() if v != "gone"}))


def rewrite(folder: Path, change):
    _, tensors = read_folder(folder)
    (folder / "adapter_model.safetensors").write_bytes(serialized(change(tensors), {"format": "pt"}))


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGE = {
    "has no adapter_config.json": lambda f: (f / "adapter_config.json").unlink(),
    "has no adapter_model.safetensors": lambda f: (f / "adapter_model.safetensors").unlink(),
    "is a pickle": lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
    "is no folder": lambda f: shutil.rmtree(f),
    "cannot be read": lambda f: (f / "adapter_model.safetensors").write_bytes(
        (f / "adapter_model.safetensors").read_bytes()[:-100]
    ),
    "written to its end": lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LO'),
    "has no peft_type": lambda f: (f / "adapter_config.json").write_text("[]"),
    "One of DELORA": lambda f: edit(f, peft_type="LORAX"),
    "leaves out r": lambda f: edit(f, r="gone"),
    "r: int": lambda f: edit(f, r="four"),
    "rank_pattern=['q_proj'] cannot be read": lambda f: edit(f, rank_pattern=["q_proj"]),
    "target_modules='(' cannot be read": lambda f: edit(f, target_modules="("),
    "about different layers": lambda f: edit(f, target_modules=["q_proj"]),
    "Without tensors: model.layers.0.self_attn.q_proj": lambda f: rewrite(
        f, lambda t: {k: v for k, v in t.items() if ".0.self_attn.q_proj" not in k}
    ),
    f"missing {Q.removeprefix('base_model.model.')}": lambda f: rewrite(f, lambda t: {k: v for k, v in t.items() if k != Q}),
    "has no place in PEFT's LORA": lambda f: rewrite(f, lambda t: t | {Q.replace("lora_A", "lora_C"): t[Q]}),
    "has no Linear model.layers.7.self_attn.q_proj": lambda f: rewrite(
        f, lambda t: t | {Q.replace("layers.0", "layers.7"): t[Q]}
    ),
    "has shape (32, 4), the config and the layer say (4, 32)": lambda f: rewrite(f, lambda t: t | {Q: t[Q].T.contiguous()}),
    "is not finite": lambda f: rewrite(f, lambda t: t | {Q: t[Q] / 0}),
    "holds no adapter tensors": lambda f: rewrite(f, lambda t: {}),
    "future_option=3 has no counterpart": lambda f: edit(f, future_option=3),
    "use_qalora=True has no counterpart": lambda f: edit(f, use_qalora=True),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_folder_changes_nothing(message, tmp_path):
    folder, _ = folder_of(tmp_path, config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    DAMAGE[message](folder)
    assert_refused(folder, message)


@pytest.mark.parametrize("neumann", [False, True])
@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda q: q[:, :-1].contiguous(), "has shape"),
        (lambda q: q[0], "has shape"),
        (lambda q: q.long(), "torch.int64"),
        (lambda q: q / 0, "nan|not finite"),
    ],
    ids=["columns", "axes", "integers", "nan"],
)
def test_what_prepares_a_layout_leaves_wrong_tensors_to_the_check(change, word, neumann, tmp_path):
    config = peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8, use_cayley_neumann=neumann)
    model = quietly(peft.get_peft_model, qwen(), config)
    quietly(model.save_pretrained, tmp_path / "a")
    key = "base_model.model.model.layers.0.self_attn.q_proj.oft_R.weight"
    rewrite(tmp_path / "a", lambda t: t | {key: change(t[key])})
    with pytest.raises(ll.LoraLiteError, match=word):
        ll.load_peft(qwen(), tmp_path / "a")


def test_names_in_use_and_other_roots_are_refused(tmp_path):
    folder, _ = folder_of(tmp_path, "ia3-both-sides")
    model = qwen()
    handle = ll.load_peft(model, folder)
    before = logits(model)
    with pytest.raises(ll.LoraLiteError, match="'default' already"):
        ll.load_peft(model, folder)
    with pytest.raises(ll.LoraLiteError, match="has no Linear"):
        ll.load_peft(qwen().model, folder)
    handle.detach()
    ll.attach(model, ll.config("lora", targets=("k_proj",)), name="style_2")
    with pytest.raises(ll.LoraLiteError, match="'style_2' already"):
        ll.load_peft(model, folder, name="style")
    assert {f.split(".")[-2] for f in model.state_dict() if "style" in f} == {"style_2"}
    assert before.isfinite().all()


def test_layout_files_are_short_and_called_like_their_variants():
    files = [p for p in (Path(ll.__file__).parent / "peft" / "layouts").glob("*.py") if p.name != "__init__.py"]
    assert {p.stem for p in files} == set(peft_layout.layouts()) <= set(ll.names())
    assert all(len(p.read_text().splitlines()) <= 60 for p in files)
