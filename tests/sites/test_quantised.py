"""Bases that other libraries quantise, and transformers' Conv1D: every variant on every kind."""

import copy
import warnings
from unittest import mock

import pytest
import torch

import lora_lite as ll
from lora_lite.calibration.measure import measure
from lora_lite.core.fingerprint import fingerprint
from lora_lite.sites.layer import Base, dense_weight
from lora_lite.sites.quantised import REPACKS, parts, repacked
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from tests.core.test_messages import refusal
from tests.oracles import compat_quantised as kinds
from tests.oracles.guide import blocks


@pytest.mark.parametrize("variant", ll.names())
def test_every_promise_holds_on_bitsandbytes_8_bit(variant):
    pytest.importorskip("bitsandbytes")
    assert kinds.check_8bit(variant) == "yes"


@pytest.mark.parametrize("variant", ll.names())
def test_every_promise_holds_on_bitsandbytes_4_bit(variant):
    pytest.importorskip("bitsandbytes")
    assert kinds.check_4bit(variant) == "yes"


@pytest.mark.parametrize("variant", ll.names())
def test_every_promise_holds_on_torchao_int8(variant):
    pytest.importorskip("torchao")
    assert kinds.check_int8(variant) == "yes"


@pytest.mark.parametrize("variant", ll.names())
def test_every_promise_holds_on_conv1d(variant):
    pytest.importorskip("transformers")
    assert kinds.check_conv1d(variant) == "yes"


PACKED = {
    "8-bit": kinds.eight_bit,
    "8-bit with outliers": lambda model: kinds.eight_bit(model, threshold=1.0),
    "nf4": kinds.four_bit,
    "nf4, plain scales": lambda model: kinds.four_bit(model, compress_statistics=False),
    "nf4, bfloat16 storage": lambda model: kinds.four_bit(model, quant_storage=torch.bfloat16),
    "fp4": lambda model: kinds.four_bit(model, quant_type="fp4"),
    "int8": kinds.int8,
}


@pytest.fixture(params=PACKED)
def packed(request):
    """A model of quantised layers."""
    pytest.importorskip("torchao" if request.param == "int8" else "bitsandbytes")
    return PACKED[request.param](kinds.pair())


def evaluated(model):
    """After a call in eval mode, which lets bitsandbytes rearrange 4-bit weights on some CPUs."""
    with torch.no_grad():
        model.eval()(toy.inputs(2, kinds.WIDTH))
    return model.train()


def test_dense_weight_is_the_matrix_of_the_layers_own_product(packed):
    x = toy.inputs(5, kinds.WIDTH)
    W = dense_weight(packed.up_proj)
    assert W.dtype == torch.float32
    assert W.shape == (kinds.INNER, kinds.WIDTH)
    assert error(packed.up_proj(x), x @ W.T) < 1e-5


def test_dense_weight_is_near_the_one_that_was_quantised(packed):
    W = kinds.pair().up_proj.weight
    assert (dense_weight(packed.up_proj) - W).abs().max() < 0.2 * W.abs().max()


def test_base_is_the_product_with_the_dense_weight_and_passes_gradients(packed):
    layer = packed.down_proj
    z, W = toy.inputs(4, kinds.INNER).requires_grad_(), dense_weight(layer)
    y = Base(layer)(z)
    assert error(y, z @ W.T) < 1e-5
    (gradient,) = torch.autograd.grad(y.square().sum(), z)
    assert error(gradient, 2 * (z @ W.T) @ W) < 1e-5


def test_base_keeps_no_dense_weight_for_the_backward_pass(packed):
    kept = []
    z = toy.inputs(4, kinds.WIDTH).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        Base(packed.up_proj)(z)
    assert max(kept, default=0) <= z.numel()


def test_base_takes_bfloat16(packed):
    z = toy.inputs(4, kinds.WIDTH, dtype=torch.bfloat16)
    y = Base(packed.up_proj)(z)
    assert y.dtype == torch.bfloat16
    assert error(y, z.float() @ dense_weight(packed.up_proj).T) < 0.02


def test_frozen_matrices_are_in_the_adapters_dtype(packed):
    handle = ll.attach(packed, ll.config("pissa", r=4))
    assert {t.dtype for a in handle.layers.values() for t in a.state_dict().values()} == {torch.float32}


def test_deepcopy_moves_and_state_dict_work_with_an_adapter(packed):
    toy.perturb(ll.attach(packed, ll.config("pissa", r=4)))
    x = toy.inputs(2, kinds.WIDTH)
    y = packed(x)
    twin = copy.deepcopy(packed).to("cpu")
    assert torch.equal(twin(x), y)
    ours = {key: tensor for key, tensor in packed.state_dict().items() if ".default." in key}
    assert {key.rpartition(".")[2] for key in ours} == {"dA", "dB", "A0", "B0"}
    hooks = kinds.anatomy(packed)["hooks"]
    ll.detach(twin)
    assert not any(kinds.anatomy(twin)["hooks"])
    assert kinds.anatomy(packed)["hooks"] == hooks
    assert torch.equal(packed(x), y)


def test_compiles_to_one_graph():
    pytest.importorskip("bitsandbytes")
    model, x = kinds.four_bit(kinds.pair()), toy.inputs(3, kinds.WIDTH)
    model(x)
    handle = toy.perturb(ll.attach(model, ll.config("dora", r=4)))
    y, wanted = model(x), kinds.gradients(model, handle, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and torchao's own while tracing
        assert error(compiled(x), y) < 1e-5
        for got, want in zip(kinds.gradients(compiled, handle, x), wanted):
            assert error(got, want) < 1e-5


def test_another_quantisation_is_refused_by_name_of_the_layer(tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")
    path = tmp_path / "a.safetensors"
    ll.attach(kinds.four_bit(kinds.pair()), ll.config("lora", r=2)).save(path)
    for other in (kinds.eight_bit, kinds.int8, PACKED["fp4"], lambda model: model):
        model = other(kinds.pair())
        refusal(
            lambda model=model: ll.load(model, path),
            "was trained on another base",
            "up_proj (dtype ",
            "saved bitsandbytes nf4, blocks of 64",
            "strict_base=False",
        )
        ll.load(model, path, strict_base=False)


def test_fingerprint_sees_numbers_and_scales(packed):
    before = fingerprint(packed.up_proj)
    assert before["shape"] == [kinds.INNER, kinds.WIDTH]
    assert fingerprint(copy.deepcopy(packed).up_proj) == before
    stored, tensors = parts(packed.up_proj)
    assert stored == before["dtype"]
    for i, tensor in enumerate(tensors):
        changed = [t.clone() for t in tensors]
        changed[i].view(-1)[-1] += 1
        with mock.patch("lora_lite.core.fingerprint.parts", lambda _, changed=changed: (stored, changed)):
            assert fingerprint(packed.up_proj)["sha256"] != before["sha256"], f"tensor {i} of shape {tuple(tensor.shape)}"


@pytest.mark.parametrize("kind", PACKED)
def test_fingerprint_tells_weights_apart_that_differ_by_a_factor(kind):
    pytest.importorskip("torchao" if kind == "int8" else "bitsandbytes")
    doubled = kinds.pair()
    doubled.up_proj.weight.data *= 2
    assert fingerprint(PACKED[kind](doubled).up_proj) != fingerprint(PACKED[kind](kinds.pair()).up_proj)


@pytest.fixture(params=["nf4", "nf4, plain scales", "nf4, bfloat16 storage", "fp4"])
def rearranged(request):
    """(the model, the same after bitsandbytes rearranged its weights for inference)."""
    pytest.importorskip("bitsandbytes")
    model = PACKED[request.param](kinds.pair())
    if not getattr(model.up_proj, REPACKS, False):
        pytest.skip("this CPU has no bfloat16 products")
    after = evaluated(copy.deepcopy(model))
    assert repacked(after.up_proj.weight)
    return model, after


def test_rearranged_weights_are_read_like_the_others(rearranged):
    model, after = rearranged
    for path in ("up_proj", "down_proj"):
        W, V = dense_weight(model.get_submodule(path)), dense_weight(after.get_submodule(path))
        assert error(V, W) < 1e-3
        assert ((V - W).abs() <= 2**-8 * W.abs()).all()
        assert fingerprint(model.get_submodule(path)) == fingerprint(after.get_submodule(path))


def test_gradients_pass_after_an_evaluation(rearranged):
    _, after = rearranged
    x = toy.inputs(3, kinds.WIDTH)
    grads = []
    for m in (kinds.dense_twin(after), after):
        handle = ll.attach(m, ll.config("lora", r=2, targets=("up_proj",)))  # down_proj, without an adapter, passes them too
        toy.perturb(handle)
        before = dense_weight(m.down_proj)
        grads.append(kinds.gradients(m, handle, x))
        assert torch.equal(dense_weight(m.down_proj), before)
        ll.detach(m)
        assert not vars(m.down_proj)["_forward_pre_hooks"]
    for want, got in zip(*grads):
        assert error(got, want) < 1e-5


def test_an_input_side_adapter_gives_the_first_layer_its_gradient_after_an_evaluation(rearranged):
    _, after = rearranged
    ll.attach(after, ll.config("lora", r=2), name="first")
    handle = toy.perturb(ll.attach(after, ll.config("hra", r=2, targets=("up_proj",)), name="second"))
    after(toy.inputs(3, kinds.WIDTH)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in handle.parameters())


def test_calibration_leaves_the_weights_as_they_are(rearranged):
    model, _ = rearranged
    handle = kinds.adapted(model, "eva")
    assert not repacked(model.up_proj.weight)
    assert getattr(model.up_proj, REPACKS)
    handle.detach()


def gradient_statistics(model):
    layers = {"up_proj": model.up_proj, "down_proj": model.down_proj}
    data = toy.batches(kinds.WIDTH, count=1)
    return measure(model, layers, ("wgrad",), data, lambda m, batch: m(**batch).square().mean())["wgrad"]


def test_gradient_statistics_are_those_of_the_dense_weights(packed):
    want, got = gradient_statistics(kinds.dense_twin(packed)), gradient_statistics(packed)
    for path, G in want.items():
        assert (got[path] - G).abs().max() < 0.05 * G.abs().max()  # 8-bit rounds what it reads


def test_gradient_statistics_pass_rearranged_weights(rearranged):
    _, after = rearranged
    want, got = gradient_statistics(kinds.dense_twin(after)), gradient_statistics(after)
    for path, G in want.items():
        assert (got[path] - G).abs().max() < 0.05 * G.abs().max()  # up_proj runs in bfloat16


def test_a_format_that_cannot_be_read_is_refused_where_it_is_read(monkeypatch):
    pytest.importorskip("torchao")
    model = kinds.int8(kinds.pair())

    def dequantize(*_):
        raise NotImplementedError

    monkeypatch.setattr(type(model.up_proj.weight), "dequantize", dequantize)
    refusal(lambda: ll.attach(model, ll.config("pissa", r=2)), "Int8Tensor", "cannot be read", "without quantisation")
    ll.attach(model, ll.config("ia3"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_weight_of_eight_bits_without_known_scales_is_not_taken_for_the_numbers(dtype):
    model = kinds.pair()
    model.up_proj.weight = torch.nn.Parameter(model.up_proj.weight.detach().to(dtype), requires_grad=False)
    refusal(lambda: ll.attach(model, ll.config("pissa", r=2)), f"Parameter of {dtype}", "cannot be read")


def test_an_adapter_of_the_dense_base_is_refused_on_its_quantised_copy(packed, tmp_path):
    ll.attach(kinds.pair(), ll.config("lora", r=2)).save(tmp_path / "a.safetensors")
    refusal(lambda: ll.load(packed, tmp_path / "a.safetensors"), "another base", "up_proj (dtype ", "saved float32")
    ll.load(packed, tmp_path / "a.safetensors", strict_base=False)


def test_layers_that_pass_no_gradient_are_refused_for_training_and_loaded_for_inference(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    trained, path = kinds.pair(), tmp_path / "a.safetensors"
    toy.perturb(ll.attach(trained, ll.config("lora", r=2, targets=("up_proj",)))).save(path)
    model = kinds.pair()
    quantization.quantize_(model.down_proj, quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    refusal(lambda: ll.attach(model, ll.config("lora", targets=("up_proj",))), "No gradient passes down_proj", "ll.load")
    with pytest.warns(ll.LoraLiteWarning, match="outside the adapted layers"):
        ll.load(model, path)
    x = toy.inputs(3, kinds.WIDTH)
    assert error(model(x), trained(x)) < 0.05


@pytest.mark.parametrize(
    ("name", "options"), [("Float8WeightOnlyConfig", {"set_inductor_config": False}), ("IntxWeightOnlyConfig", {})]
)
def test_other_weight_only_formats_of_torchao_are_read_too(name, options):
    quantization = pytest.importorskip("torchao.quantization")
    model = kinds.pair()
    quantization.quantize_(model, getattr(quantization, name)(**options))
    x, twin = toy.inputs(3, kinds.WIDTH), kinds.dense_twin(model)
    handles = [toy.perturb(ll.attach(m, ll.config("dora", r=2))) for m in (model, twin)]
    for got, want in zip(*(kinds.gradients(m, handle, x) for m, handle in zip((model, twin), handles))):
        assert error(got, want) < 1e-5
    assert name[:4].lower() in fingerprint(model.up_proj)["dtype"].lower()


def test_smoothed_torchao_weights_are_read_with_their_factor():
    pytest.importorskip("torchao")
    layer = kinds.int8(kinds.pair()).up_proj
    layer.weight.act_pre_scale = torch.linspace(0.5, 2.0, kinds.WIDTH)
    x = toy.inputs(3, kinds.WIDTH)
    assert error(layer(x), x @ dense_weight(layer).T) < 1e-5


def quantisation(kind):
    """Options of `from_pretrained`."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    if kind == "int8":
        config = pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig(set_inductor_config=False)
        return transformers.TorchAoConfig(config)
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(
        load_in_8bit=kind == "8-bit", load_in_4bit=kind == "4-bit", bnb_4bit_quant_type="nf4"
    )


@pytest.mark.parametrize("kind", ["8-bit", "4-bit", "int8"])
def test_a_language_model_that_transformers_quantises_is_evaluated_adapted_trained_and_reloaded(kind, tmp_path):
    options = {"quantization_config": quantisation(kind), "device_map": "cpu", "dtype": torch.float32}
    import transformers

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    toy.seeded(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))).save_pretrained(tmp_path)
    model, fresh = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options) for _ in range(2))
    ids = torch.arange(18).reshape(2, 9)
    with torch.no_grad():
        before = model(ids).logits
    ll.attach(model, ll.config("dora", r=4))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=1e-2))
    losses = []
    for _ in range(3):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            after = model.eval()(ids).logits
    assert losses == sorted(losses, reverse=True)
    ll.save(model, tmp_path / "a.safetensors")
    ll.load(fresh, tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, after)
    ll.detach(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_guide_runs(tmp_path):
    pytest.importorskip("bitsandbytes")
    names = {"torch": torch, "ll": ll, "lora_lite": ll, "folder": tmp_path, "x": toy.inputs(3, kinds.WIDTH)}
    names |= {"model": kinds.pair(), "dense_model": kinds.pair()}
    for block in blocks("quantised"):
        assert len(block.splitlines()) < 15
        exec(block, names)
    assert names["delta"].shape == names["W"].shape
    assert ll.status(names["dense_model"]).layers[0].merged
