"""Tensors beside the adapter, files of several adapters: what a file holds comes back whole, what it does not hold is said."""

import copy
import warnings

import pytest
import torch
import transformers as T
from torch import nn

import lora_lite as ll
from lora_lite.core.checkpoint import checksum, read, serialized, write_atomically
from lora_lite.testing import toy

X = toy.inputs(3, 5, 24)
BERT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}


def two():
    model = toy.toy()
    one = toy.perturb(ll.attach(model, ll.config("lora", r=2)), 0.2)
    other = toy.perturb(ll.attach(model, ll.config("dora", r=2, targets=("o_proj",)), name="test-adapter.2"), 0.2)
    return model, one, other


# --- several adapters -------------------------------------------------------------------------------------------------


def test_one_file_holds_all_adapters_and_brings_all_back(tmp_path):
    model, *_ = two()
    ll.save(model, tmp_path / "a")
    fresh = toy.toy()
    handles = ll.load(fresh, tmp_path / "a")
    assert list(handles) == ["default", "test-adapter.2"]
    assert torch.equal(fresh(X), model(X))
    handles.save(tmp_path / "b")
    assert read(tmp_path / "a")[0] == read(tmp_path / "b")[0]
    with handles:
        handles.scale(0.0)
        assert torch.equal(fresh(X), toy.toy()(X))
    assert torch.equal(fresh(X), toy.toy()(X))
    assert not ll.status(fresh).layers


def test_one_of_several_is_taken_by_its_name_and_may_get_another(tmp_path):
    model, *_ = two()
    ll.save(model, tmp_path / "a")
    assert ll.load(toy.toy(), tmp_path / "a", name="test-adapter.2").name == "test-adapter.2"
    assert ll.load(toy.toy(), tmp_path / "a", name="default", names={"default": "2nd"}).name == "2nd"
    assert set(ll.load(toy.toy(), tmp_path / "a", names={"default": "2nd"})) == {"2nd", "test-adapter.2"}
    with pytest.raises(ll.LoraLiteError, match="Closest name: default"):
        ll.load(toy.toy(), tmp_path / "a", name="defualt")
    with pytest.raises(ll.LoraLiteError, match="two adapters one name"):
        ll.load(toy.toy(), tmp_path / "a", names={"default": "test-adapter.2"})


@pytest.mark.parametrize("name", ["test-adapter", "a.b", "2nd", "mit Leerzeichen", "é"])
def test_names_of_folders_and_hubs_are_kept(tmp_path, name):
    model = toy.toy()
    handle = toy.perturb(ll.attach(model, ll.config("lora", r=2), name=name))
    assert {row.name for row in ll.status(model).layers} == {name}
    ll.save(model, tmp_path / "a")
    fresh = toy.toy()
    assert ll.load(fresh, tmp_path / "a").name == name
    assert torch.equal(fresh(X), model(X))
    with pytest.raises(ll.LoraLiteError, match="There is an adapter"):
        ll.attach(model, ll.config("lora"), name=name)
    handle.detach()


def test_modules_that_were_renamed_since_are_mapped_and_loading_may_freeze(tmp_path):
    model = toy.toy()
    toy.perturb(ll.attach(model, ll.config("lora", r=2))).save(tmp_path / "a")
    wrapped = nn.ModuleDict({"inner": toy.toy()})
    handle = ll.load(wrapped, tmp_path / "a", paths={"blocks": "inner.blocks"}, trainable=False)
    assert set(handle.layers) == {f"inner.{f.path}" for f in ll.status(model).layers}
    assert torch.equal(wrapped["inner"](X), model(X))
    assert not any(p.requires_grad for p in wrapped.parameters())


def step(model, optimizer):
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


def test_restore_copies_into_the_parameters_of_an_optimizer_which_goes_on_to_the_bit(tmp_path):
    model = toy.toy()
    handle = ll.attach(model, ll.config("lora", r=2))
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2)
    step(model, optimizer)
    handle.save(tmp_path / "a")
    state = copy.deepcopy(optimizer.state_dict())
    step(model, optimizer)
    wanted = model(X)
    parameters = list(handle.parameters())
    handle.restore(tmp_path / "a")
    optimizer.load_state_dict(state)
    step(model, optimizer)
    assert torch.equal(model(X), wanted)
    assert all(a is b for a, b in zip(parameters, handle.parameters()))
    other = ll.attach(toy.toy(), ll.config("dora", r=2))
    before = [p.detach().clone() for p in other.parameters()]
    with pytest.raises(ll.LoraLiteError, match="does not hold adapter"):
        other.restore(tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters()))


def test_a_changed_number_is_a_damaged_file(tmp_path):
    model, *_ = two()
    ll.save(model, tmp_path / "a")
    header, tensors = read(tmp_path / "a")
    key = next(iter(tensors))
    tensors[key] = tensors[key] + 1e-3
    write_atomically(tmp_path / "b", serialized(tensors, header))
    with pytest.raises(ll.LoraLiteError, match="is damaged"):
        ll.load(toy.toy(), tmp_path / "b")
    write_atomically(tmp_path / "b", serialized(tensors, {**header, "checksum": checksum(tensors)}))
    ll.load(toy.toy(), tmp_path / "b")


# --- what a file does not hold ------------------------------------------------------------------------------------------


def test_a_head_that_was_trained_beside_the_adapter_is_named_and_the_repair_keeps_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make = lambda: toy.seeded(lambda: T.BertForSequenceClassification(T.BertConfig(**BERT, num_labels=3)).eval())  # noqa: E731
    model, ids = make(), torch.arange(2, 12).reshape(2, 5)
    ll.attach(model, ll.config("lora", r=2))
    model.classifier.requires_grad_(True)
    with pytest.warns(ll.LoraLiteWarning, match="stand in no group"):
        ll.param_groups(model)
    nn.init.normal_(model.classifier.weight)
    with pytest.warns(ll.LoraLiteWarning, match=r"does not hold classifier\.weight, classifier\.bias") as said:
        ll.save(model, "a")
    with pytest.warns(ll.LoraLiteWarning, match="The snapshot does not hold classifier"):
        ll.snapshot(model)
    text = str(said[0].message)
    exec(text[text.index("torch.save(") : text.index(", and model.load")], {"torch": torch, "model": model})
    fresh = make()
    ll.load(fresh, "a")
    assert not torch.equal(fresh(ids).logits, model(ids).logits)
    fresh.load_state_dict(torch.load("beside.pt"), strict=False)
    assert torch.equal(fresh(ids).logits, model(ids).logits)


def batchnorm():
    return toy.seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)))


def test_statistics_that_move_are_refused_named_at_save_and_put_back_at_detach(tmp_path):
    model, x = batchnorm().train(), toy.inputs(32, 8)
    with pytest.raises(ll.LoraLiteError, match=r"1 would move in train mode[\s\S]*eval\(\)"):
        ll.attach(model, ll.config("lora", r=2))
    handle = ll.attach(model.eval(), ll.config("lora", r=2))
    model.train()
    model(x + 3)
    with pytest.warns(ll.LoraLiteWarning, match=r"1\.running_mean, 1\.running_var"):
        ll.save(model, tmp_path / "a")
    handle.detach()
    for name, buffer in batchnorm().named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    spectral = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))).train()
    with pytest.raises(ll.LoraLiteError, match="would move in train mode"):
        ll.attach(spectral, ll.config("lora", r=2))


@pytest.mark.parametrize("change", ["rows", "columns", "bias", "one column"])
@pytest.mark.parametrize("width", [1024, 768])
def test_a_base_that_differs_in_rows_columns_or_bias_is_another_base(tmp_path, width, change):
    make = lambda: toy.seeded(lambda: nn.Sequential(nn.Linear(width, 1024)))  # noqa: E731
    ll.attach(make(), ll.config("lora", r=2)).save(tmp_path / "a")
    other = make()
    with torch.no_grad():
        if change == "rows":
            other[0].weight[1::2] = 0
        elif change == "columns":
            other[0].weight[:, 4:] *= -1
        elif change == "one column":
            other[0].weight[:, 77] += 1
        else:
            other[0].bias += 5
    with pytest.raises(ll.LoraLiteError, match=f"another base.*0 .{'bias' if change == 'bias' else 'content'}"):
        ll.load(other, tmp_path / "a")


def test_the_same_numbers_in_a_wider_dtype_are_the_same_base(tmp_path):
    ll.attach(toy.toy().bfloat16(), ll.config("lora", r=2)).save(tmp_path / "a")
    ll.load(toy.toy().bfloat16().float(), tmp_path / "a")
    with pytest.raises(ll.LoraLiteError, match="another base"):
        ll.load(toy.toy(), tmp_path / "a")


def test_other_weights_outside_the_adapted_layers_are_warned_of(tmp_path):
    make = lambda: toy.seeded(lambda: T.BertModel(T.BertConfig(**BERT)).eval())  # noqa: E731
    ll.attach(make(), ll.config("lora", r=2, targets=("query",))).save(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ll.LoraLiteWarning)
        ll.load(make(), tmp_path / "a")
    other = make()
    with torch.no_grad():
        other.embeddings.word_embeddings.weight += 1
    with pytest.warns(ll.LoraLiteWarning, match="outside the adapted layers"):
        ll.load(other, tmp_path / "a")


def test_other_weights_in_a_wider_dtype_are_the_same(tmp_path):
    make = lambda: toy.seeded(lambda: T.BertModel(T.BertConfig(**BERT)).eval()).bfloat16()  # noqa: E731
    ll.attach(make(), ll.config("lora", r=2, targets=("query",))).save(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ll.LoraLiteWarning)
        ll.load(make().float(), tmp_path / "a")


def test_weights_that_were_written_to_beside_the_adapter_are_named(tmp_path):
    """As an edit of an embedding by hand, which asks for no gradient."""
    model = toy.seeded(lambda: T.BertModel(T.BertConfig(**BERT)).eval())
    handle = ll.attach(model, ll.config("lora", r=2, targets=("query",)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ll.LoraLiteWarning)
        handle.save(tmp_path / "a")
        ll.snapshot(model)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight += 1
    with pytest.warns(ll.LoraLiteWarning, match=r"does not hold embeddings\.word_embeddings\.weight of the base"):
        handle.save(tmp_path / "a")
    with pytest.warns(ll.LoraLiteWarning, match=r"does not hold embeddings\.word_embeddings\.weight of the base"):
        ll.snapshot(model)
    with pytest.warns(ll.LoraLiteWarning, match="word_embeddings.weight of the base were trained or written to"):
        handle.detach()


@torch.no_grad()
@pytest.mark.parametrize(
    ("place", "when"), [("embeddings.word_embeddings", "after"), ("encoder.layer.0.attention.self.query", "before")]
)
def test_one_row_that_was_trained_and_frozen_again_is_named(place, when, tmp_path):
    """Of the layer under the adapter as well, and with numbers that no sample meets."""
    model = toy.seeded(lambda: T.BertModel(T.BertConfig(**BERT)).eval())
    handle = ll.attach(model, ll.config("lora", r=2, targets=("query",)))
    weight = model.get_submodule(place).weight
    weight.requires_grad_(True)[1, 3] += 1
    weight.requires_grad_(False)
    with pytest.warns(ll.LoraLiteWarning, match=rf"does not hold {place}\.weight of the base.* {when} ll\.load"):
        handle.save(tmp_path / "a")
    with pytest.warns(ll.LoraLiteWarning, match=rf"{place}\.weight of the base were trained or written to"):
        handle.detach()


def test_a_cast_is_no_edit():
    model = toy.seeded(lambda: T.BertModel(T.BertConfig(**BERT)).eval())
    with ll.attach(model, ll.config("lora", r=2, targets=("query",))):
        model.to(torch.bfloat16)
        ll.snapshot(model)
        ll.merge(model)
        ll.unmerge(model)


def test_weights_that_were_loaded_while_an_adapter_was_merged_are_lost_and_it_is_said():
    model, other = toy.toy(), toy.seeded(toy.Toy, 1).eval()
    handle = toy.perturb(ll.attach(model, ll.config("lora", r=2)))
    ll.merge(model)
    with torch.no_grad():
        for path in handle.layers:
            model.get_submodule(path).weight.copy_(other.get_submodule(path).weight)
    with pytest.warns(ll.LoraLiteWarning, match=r"merged weights of blocks\.0.* were written to or exchanged since ll\.merge"):
        ll.unmerge(model)


def test_the_repair_keeps_all_of_many_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make = lambda: toy.seeded(lambda: T.BertModel(T.BertConfig(**BERT)).eval())  # noqa: E731
    model, ids = make(), torch.arange(2, 12).reshape(2, 5)
    handle = ll.attach(model, ll.config("lora", r=2, targets=("query",)))
    moved = [p for name, p in model.named_parameters() if "query" not in name and not name.startswith("pooler")]
    assert len(moved) > 12
    with torch.no_grad():
        for p in moved:
            p += 0.1
    with pytest.warns(ll.LoraLiteWarning, match="does not hold") as said:
        handle.save("a")
    text = str(said[0].message)
    save, load = text[text.index("torch.save(") :].removesuffix(" after ll.load").split(", and ")
    exec(save, {"torch": torch, "model": model})
    fresh = make()
    ll.load(fresh, "a")
    exec(load, {"torch": torch, "model": fresh})
    assert torch.equal(fresh(ids).last_hidden_state, model(ids).last_hidden_state)


def test_numbers_that_are_not_finite_never_write_over_a_good_file(tmp_path):
    model = toy.toy()
    handle = ll.attach(model, ll.config("lora", r=2))
    handle.save(tmp_path / "a")
    good = (tmp_path / "a").read_bytes()
    with torch.no_grad():
        next(handle.parameters()).fill_(float("nan"))
    with pytest.raises(ll.LoraLiteError, match=r"blocks\.0\.q_proj\.A is not finite[\s\S]*handle\.restore"):
        handle.save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == good
    handle.restore(tmp_path / "a")
    handle.save(tmp_path / "a")


def test_adapters_of_one_config_under_two_names_start_apart_and_the_default_name_as_ever():
    model = toy.toy()
    a, b = (ll.attach(model, ll.config("lora", r=4), name=name) for name in ("m1", "m2"))
    path = next(iter(a.layers))
    assert not torch.equal(a.layers[path].A, b.layers[path].A)
    again = ll.attach(toy.toy(), ll.config("lora", r=4), name="m1")
    assert torch.equal(again.layers[path].A, a.layers[path].A)


def test_an_embedding_that_was_written_to_beside_the_adapter_is_named(tmp_path):
    model = toy.seeded(lambda: T.BertModel(T.BertConfig(**BERT)).eval())
    ll.attach(model, ll.config("lora", r=2))
    with torch.no_grad():
        model.embeddings.word_embeddings.weight *= 2
    with pytest.warns(ll.LoraLiteWarning, match=r"does not hold embeddings\.word_embeddings\.weight"):
        ll.save(model, tmp_path / "a")
    cast = toy.seeded(lambda: T.BertModel(T.BertConfig(**BERT)).eval())
    ll.attach(cast, ll.config("lora", r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ll.LoraLiteWarning)
        ll.save(cast.bfloat16(), tmp_path / "b")
