"""Gradients count by the terms of the losses they come from: the start follows from the data, not from its batches."""

from types import SimpleNamespace

import pytest
import torch

import lora_lite as ll
from lora_lite.calibration.losses import Losses
from lora_lite.calibration.measure import measure
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from tests.calibration.test_masks import bart, bert, gpt2, ids, inside, kept, t5

transformers = pytest.importorskip("transformers")


def labels_of(words):
    labels = words.clone()
    labels[0, :10] = -100
    labels[1, :6] = -100
    labels[2, 9:] = -100
    return labels


def whole_and_rows(batch):
    return [batch], [{name: t[k : k + 1] for name, t in batch.items()} for k in range(4)]


@pytest.mark.parametrize(
    "make",
    [gpt2, t5, bart, lambda: bert("BertForMaskedLM"), lambda: bert("BertForTokenClassification", num_labels=64)],
    ids=["causal", "t5", "bart", "masked", "tokens"],
)
def test_gradient_does_not_depend_on_how_rows_are_cut_into_batches(make):
    """Losses of next tokens, of a decoder's tokens and of the tokens' own labels; rows with 2 to 12 terms each."""
    model, words = make().eval(), ids(4, 12)
    batch = {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels_of(words)}
    layers = {path: layer for path, layer in inside(model).items() if "decoder" not in path or "cls" not in path}
    layers = {path: layer for path, layer in layers.items() if not path.startswith("cls.predictions.decoder")}
    one, rows = (measure(model, layers, ("wgrad", "terms"), data) for data in whole_and_rows(batch))
    for path in layers:
        size = float(one["wgrad"][path].abs().max())
        assert error(one["wgrad"][path], rows["wgrad"][path]) < 2e-5 * max(size, 1.0), path
    counts = batch["labels"] if make is not gpt2 else batch["labels"][:, 1:]
    assert set(map(float, one["terms"].values())) == set(map(float, rows["terms"].values())) == {float((counts != -100).sum())}


@pytest.mark.parametrize("scale", ["stable", "peft_stable"])
def test_start_of_lora_ga_does_not_depend_on_how_rows_are_cut_into_batches(scale):
    starts, words = [], ids(4, 12)
    for data in whole_and_rows({"input_ids": words, "labels": labels_of(words)}):
        handle = ll.attach(gpt2(), ll.config("lora_ga", r=4, scale=scale, exclude=("lm_head",)), data)
        starts.append(
            {path: a.B0.float() @ a.A0.float() if scale == "stable" else a.B0 @ a.B0.T for path, a in handle.layers.items()}
        )
    for path, start in starts[0].items():
        assert error(start.double(), starts[1][path].double()) < 1e-3 * float(start.abs().max()), path


def test_loss_function_may_say_how_many_terms_its_mean_has():
    made, x = toy.one(24, 32).double(), toy.inputs(12, 24, dtype=torch.float64)
    layer = {"l": made.o_proj}

    def mean(made, batch):
        return made(batch).square().mean(), len(batch)

    cuts = [measure(made, layer, ("wgrad", "terms"), data, mean) for data in ([x], [x[:2], x[2:]], list(x.split(1)))]
    for cut in cuts[1:]:
        assert error(cut["wgrad"]["l"], cuts[0]["wgrad"]["l"]) < 1e-12
        assert cut["terms"]["l"] == 12
    plain = measure(made, layer, ("terms",), [x, x], lambda made, batch: made(batch).sum())
    assert plain["terms"]["l"] == 0, "no loss was asked for"
    plain = measure(made, layer, ("wgrad", "terms"), [x, x], lambda made, batch: made(batch).sum())
    assert plain["terms"]["l"] == 2


@pytest.mark.parametrize("own", [False, True])
def test_batch_without_a_label_is_named_as_such(own):
    words = ids(4, 12)
    full, empty = {"input_ids": words, "labels": words}, {"input_ids": words, "labels": torch.full_like(words, -100)}
    fields = {"loss_fn": lambda model, batch: model(**batch).loss} if own else {}
    model = gpt2()
    with pytest.raises(ll.LoraLiteError, match=r"All labels of a calibration batch are -100, shape \(4, 12\)(.|\n)*!= -100"):
        ll.attach(model, ll.config("lora_ga", r=2, exclude=("lm_head",), **fields), [full, empty])
    first = torch.full_like(words, -100)
    first[:, 0] = words[:, 0]
    if not own:
        with pytest.raises(ll.LoraLiteError, match="but those of first tokens, which nothing predicts, are -100"):
            ll.attach(model, ll.config("lora_ga", r=2, exclude=("lm_head",)), [full, {"input_ids": words, "labels": first}])
    assert not any("_forward_hooks" in k and v for m in model.modules() for k, v in vars(m).items() if k == "_forward_hooks")


@pytest.mark.parametrize(("make", "fields"), [(bart, {}), (lambda: bert("BertForSequenceClassification"), {})])
def test_logits_that_predict_no_next_token_need_labels(make, fields):
    model = make().eval()
    with pytest.raises(ll.LoraLiteError, match=r"predict no next token of input_ids(.|\n)*labels"):
        measure(model, inside(model), ["wgrad"], [{"input_ids": ids(2, 9), "attention_mask": kept(4, 9), **fields}])


def test_losses_of_samples_count_by_samples():
    model = bert("BertForSequenceClassification").eval()
    batch = {"input_ids": ids(3, 9), "labels": torch.tensor([0, 1, 1])}
    assert Losses()(model, batch)[1] == 3
    assert Losses()(lambda **batch: SimpleNamespace(loss=torch.tensor(1.0)), {"x": torch.ones(5, 2)})[1] == 5
