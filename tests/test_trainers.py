"""whynan around the loops of Lightning and of transformers, which are no part of the project's own environment."""

import contextlib
import linecache
import math

import pytest
import torch
from torch import nn

import whynan

INF = float("inf")


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No network, and what the trainers write of their own accord goes to the test's folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def lightning():
    try:
        import lightning.pytorch as module
    except ImportError:
        module = pytest.importorskip("pytorch_lightning", exc_type=ImportError)
    return module


@pytest.fixture
def transformers():
    pytest.importorskip("accelerate", exc_type=ImportError)
    return pytest.importorskip("transformers", exc_type=ImportError)


def weights(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def check_line(error, file, part):
    """The line that the error names is where it says, and is the one expected."""
    assert error.line.file.endswith(file) and part in error.line.text
    assert linecache.getline(error.line.file, error.line.number).strip() == error.line.text.strip()


def fit_lightning(lightning, tmp_path, watch, worst=1.0, **options):
    """Fits five batches of eight with Lightning, the third scaled by `worst`; returns the losses and the weights."""
    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
            self.losses, self.undefined = [], []

        def training_step(self, batch, index):
            x, y = batch
            p = torch.softmax(self.net(x) * x.abs().amax(), dim=1)
            p = p.gather(1, y[:, None])
            loss = -p.log().mean()
            self.losses.append(loss.detach())
            return loss

        def validation_step(self, batch, index):
            x, y = batch
            logits = self.net(x) + torch.tensor([0.0, 0.0, -INF])
            hits = logits.argmax(1) == y
            self.undefined.append((hits[y == 3].float().mean()).item())

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    lightning.seed_everything(0, verbose=False)
    x, y = torch.randn(40, 4), torch.arange(40) % 3
    x[16:24] *= worst
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    model = Classifier()
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, **options,
    )
    before = weights(model)
    with watch(model):
        trainer.fit(model, loader, loader)
    assert trainer.global_step == math.ceil(5 / options.get("accumulate_grad_batches", 1))
    assert all(math.isnan(value) for value in model.undefined) and len(model.undefined) == 7
    assert not same(before, weights(model))
    return torch.stack(model.losses), weights(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}], ids=str)
def test_lightning_healthy(lightning, tmp_path, capsys, options):
    losses, plain = fit_lightning(lightning, tmp_path, contextlib.nullcontext, **options)
    assert losses.isfinite().all() and len(losses) == 5
    capsys.readouterr()
    _, watched = fit_lightning(lightning, tmp_path, whynan.watch, **options)
    assert "whynan" not in "".join(capsys.readouterr())
    assert same(plain, watched)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("options", "step"), [({}, 3), ({"accumulate_grad_batches": 2}, 2)], ids=str)
def test_lightning_logarithm_of_zero(lightning, tmp_path, options, step):
    losses, plain = fit_lightning(lightning, tmp_path, contextlib.nullcontext, worst=1e3, **options)
    assert losses[:2].isfinite().all() and losses[2] == INF
    assert any(value.isnan().any() for value in plain.values())
    with pytest.raises(whynan.NonFiniteError) as caught:
        fit_lightning(lightning, tmp_path, whynan.watch, worst=1e3, **options)
    error = caught.value
    assert (error.step, error.phase, error.module, error.operation) == (step, "loss", "", "log")
    check_line(error, "test_trainers.py", "loss = -p.log().mean()")


def train_transformers(transformers, tmp_path, kind, watch, empty=(), **options):
    """Trains on five batches of four, those in `empty` without labels, by transformers' Trainer."""
    transformers.set_seed(0)
    if kind == "bert":
        model = transformers.BertForTokenClassification(transformers.BertConfig(
            vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            num_labels=3,
        ))
    else:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=20, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        ))
    tokens = torch.randint(1, 20, (20, 8))
    used = torch.arange(8) < torch.randint(3, 9, (20, 1))
    labels = (tokens % 3 if kind == "bert" else tokens).masked_fill(~used, -100)
    for batch in empty:
        labels[4 * batch:4 * batch + 4] = -100
    columns = {"input_ids": tokens, "attention_mask": used.long(), "labels": labels}
    rows = [{name: column[row] for name, column in columns.items()} for row in range(20)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4, num_train_epochs=1, learning_rate=1e-2,
        train_sampling_strategy="sequential", logging_steps=1, logging_nan_inf_filter=False, save_strategy="no",
        report_to=[], disable_tqdm=True, **options,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.remove_callback(transformers.PrinterCallback)
    before = weights(model)
    with watch(model):
        trainer.train()
    assert not same(before, weights(model))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor(losses), weights(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_transformers_healthy(transformers, tmp_path, capsys, kind):
    losses, plain = train_transformers(transformers, tmp_path, kind, contextlib.nullcontext)
    assert losses.isfinite().all() and len(losses) == 5
    capsys.readouterr()
    _, watched = train_transformers(transformers, tmp_path, kind, whynan.watch)
    assert "whynan" not in "".join(capsys.readouterr())
    assert same(plain, watched)


# BERT's loss is the mean of nothing; GPT-2's is a sum that the Trainer divides by its count of labels, zero. The
# gradient of what is ignored is zero on the CPU all the same, so the weights live; the logged loss is NaN ever after.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "operation", "file", "part"), [
    ("bert", "nll_loss_forward", "modeling_bert.py", "loss = loss_fct("),
    ("gpt2", "div", "loss_utils.py", "loss = loss / num_items_in_batch"),
])
def test_transformers_mean_of_nothing(transformers, tmp_path, kind, operation, file, part):
    losses, plain = train_transformers(transformers, tmp_path, kind, contextlib.nullcontext, empty=[2])
    assert losses.isnan().tolist() == [False, False, True, True, True]
    assert all(value.isfinite().all() for value in plain.values())
    with pytest.raises(whynan.NonFiniteError) as caught:
        train_transformers(transformers, tmp_path, kind, whynan.watch, empty=[2])
    error = caught.value
    assert (error.step, error.operation) == (3, operation) and error.phase in ("forward", "loss")
    check_line(error, "test_trainers.py", "trainer.train()")  # the owner's; the library's stands below it
    assert f"{file}, line" in str(error) and part in str(error)
