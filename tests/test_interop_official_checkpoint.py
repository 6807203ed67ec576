"""Checkpoints in the official format: contents, resuming, refusals."""

import copy
import pickle

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from ijepa_fast.interop import official
from ijepa_fast.weights.official import read, write
from ijepa_fast.weights.reading import WeightsError

SCHEDULE = {"iterations_per_epoch": 2, "start_lr": 1e-3, "ref_lr": 1e-3, "warmup": 0, "num_epochs": 5}


class Run:
    """A small training run as the official script sets one up."""

    def __init__(self, seed=0, embed_dim=24, optimizer=None):
        torch.manual_seed(seed)
        self.encoder = official.VisionTransformer([24], 8, embed_dim=embed_dim, depth=2, num_heads=3)
        self.predictor = official.vit_predictor(
            num_patches=9, embed_dim=embed_dim, predictor_embed_dim=12, depth=1, num_heads=3
        )
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        self.opt, self.scaler, *self.schedules = official.init_opt(
            self.encoder, self.predictor, use_bfloat16=True, **SCHEDULE
        )
        if optimizer is not None:
            self.opt = optimizer(official.parameter_groups(self.encoder, self.predictor))

    def train(self, steps, first=0):
        for step in range(first, first + steps):
            images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(step))
            context, target = torch.tensor([[0, 4, 5], [1, 2, 7]]), torch.tensor([[8, 3], [6, 0]])
            predicted = self.predictor(self.encoder(images, context), context, target)
            wanted = official.apply_masks(self.target(images), [target])
            torch.nn.functional.smooth_l1_loss(predicted, wanted).backward()
            self.opt.step()
            self.opt.zero_grad()
        return self

    def save(self, path):
        official.save_checkpoint(
            path, self.encoder, self.predictor, self.target, self.opt, self.scaler,
            epoch=3, loss=0.25, batch_size=2, world_size=1, lr=1e-3,
        )  # fmt: skip
        return path

    def load(self, path):
        return official.load_checkpoint("cpu", path, self.encoder, self.predictor, self.target, self.opt, self.scaler)

    def tensors(self):
        parts = {"encoder": self.encoder, "predictor": self.predictor, "target": self.target}
        found = {f"{part}.{n}": v for part, module in parts.items() for n, v in module.state_dict().items()}
        for number, state in self.opt.state_dict()["state"].items():
            found |= {f"opt.{number}.{key}": value for key, value in state.items()}
        return copy.deepcopy(found)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return Run().train(2).save(tmp_path_factory.mktemp("official") / "jepa-latest.pth.tar")


def test_the_file_has_the_official_form(path):
    contents = torch.load(path, weights_only=True)
    assert list(contents) == [
        "encoder", "predictor", "target_encoder", "opt", "scaler", "epoch", "loss", "batch_size", "world_size", "lr"
    ]  # fmt: skip
    assert next(iter(contents["encoder"])) == "module.pos_embed"
    assert next(iter(contents["predictor"])) == "module.mask_token"
    assert contents["scaler"]["scale"] == 65536.0
    groups = contents["opt"]["param_groups"]
    assert [group.get("WD_exclude", False) for group in groups] == [False, False, True, True]
    # Encoder matrices: table, patches, 2 x 4; predictor: mask token, table, 2 projections, 4.
    assert [len(group["params"]) for group in groups] == [10, 8, 19, 12]
    frozen = {0, 11}  # the encoder's table and, after the mask token, the predictor's
    assert set(contents["opt"]["state"]) == set(range(49)) - frozen
    assert all(state["step"] == 2 for state in contents["opt"]["state"].values())
    assert not list(path.parent.glob("*.partial"))


@pytest.mark.parametrize("optimizer", [None, torch.optim.AdamW], ids=["FusedAdamW", "torch"])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(path, tmp_path, optimizer):
    straight = Run(optimizer=optimizer).train(2).train(2, first=2)
    start = Run(optimizer=optimizer).train(2).save(tmp_path / "checkpoint.pth.tar")
    resumed = Run(seed=1, optimizer=optimizer)
    *_, epoch = resumed.load(start)
    resumed.train(2, first=2)
    assert epoch == 3
    torch.testing.assert_close(resumed.tensors(), straight.tensors(), rtol=0, atol=0)


def test_each_optimizer_resumes_from_the_other(tmp_path):
    """torch's AdamW is the official optimizer. Rounding: both add up in fp32, in another order."""
    straight = Run(optimizer=torch.optim.AdamW).train(4)
    for first, second in ((None, torch.optim.AdamW), (torch.optim.AdamW, None)):
        file = Run(optimizer=first).train(2).save(tmp_path / "c.pth.tar")
        resumed = Run(seed=1, optimizer=second)
        resumed.load(file)
        resumed.train(2, first=2)
        for part in ("encoder", "predictor"):
            pairs = zip(getattr(resumed, part).parameters(), getattr(straight, part).parameters(), strict=True)
            # Gradients that are zero but for rounding (key biases) move by up to lr a step, so outputs are compared.
            assert all(torch.allclose(a, b, atol=4e-3) for a, b in pairs)
        images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(9))
        torch.testing.assert_close(resumed.encoder(images), straight.encoder(images), rtol=1e-4, atol=1e-5)


def test_wrapped_modules_make_no_difference(path, tmp_path):
    rendezvous = tmp_path / "rendezvous"
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    try:
        run, plain = Run(seed=1), Run(seed=2)
        run.encoder, run.predictor = DistributedDataParallel(run.encoder), DistributedDataParallel(run.predictor)
        run.load(path)
        plain.load(path)
        assert torch.equal(run.encoder.module.norm.weight, plain.encoder.norm.weight)
        again = read(run.save(tmp_path / "again.pth.tar"))
        torch.testing.assert_close(again.encoder, dict(plain.encoder.state_dict()), rtol=0, atol=0)
    finally:
        torch.distributed.destroy_process_group()


def test_steps_may_be_plain_numbers_as_older_versions_of_torch_wrote_them(path, tmp_path):
    def plain(contents):
        for state in contents["opt"]["state"].values():
            state["step"] = int(state["step"])

    old = other(path, tmp_path, plain)
    for optimizer in (None, torch.optim.AdamW):
        run, new = Run(seed=1, optimizer=optimizer), Run(seed=1, optimizer=optimizer)
        run.load(old)
        new.load(path)
        torch.testing.assert_close(run.train(1).tensors(), new.train(1).tensors(), rtol=0, atol=0)
    write(tmp_path / "again.pth.tar", read(old))
    assert read(tmp_path / "again.pth.tar").opt["state"][1]["step"] == 2


def test_forgotten_exclusions_are_put_back(path, tmp_path):
    contents = torch.load(path, weights_only=True)
    for group in contents["opt"]["param_groups"]:
        group.pop("WD_exclude", None)
        group["weight_decay"] = 0.3
    torch.save(contents, tmp_path / "forgotten.pth.tar")
    run = Run()
    run.load(tmp_path / "forgotten.pth.tar")
    run.schedules[1].step()
    assert [group["weight_decay"] for group in run.opt.param_groups][2:] == [0, 0]


class Code:
    def __reduce__(self):
        return print, ("code that a checkpoint ran",)


def other(path, tmp_path, change):
    contents = torch.load(path, weights_only=True)
    change(contents)
    torch.save(contents, tmp_path / "other.pth.tar")
    return tmp_path / "other.pth.tar"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("predictor"), "no official I-JEPA checkpoint: it needs encoder, predictor, target_encoder"),
        (lambda c: c["encoder"].pop("module.norm.weight"), r"1 missing: norm.weight"),
        (
            lambda c: c["encoder"].update({"module.norms.weight": c["encoder"].pop("module.norm.weight")}),
            r"norm.weight \(nearest: norms.weight\)\n.*norms.weight \(nearest: norm.weight\)",
        ),
        (
            lambda c: c["target_encoder"].update({"module.pos_embed": torch.zeros(1, 16, 24)}),
            "target_encoder of .*trained on 16 patches per image and the model is built for 9.*interpolate_positions",
        ),
        (lambda c: c.update(opt=None), "has no optimizer state"),
        (lambda c: c.update(opt=[1]), "no state_dict of an optimizer"),
        (lambda c: c["opt"].pop("param_groups"), "no state_dict of an optimizer"),
        (lambda c: c["opt"].update(state=1), "no state_dict of an optimizer"),
        (lambda c: c["opt"]["param_groups"][3]["params"].pop(), r"\[10, 8, 19, 11\] parameters"),
        (lambda c: c["opt"]["state"][5].update(exp_avg=torch.zeros(3)), r"exp_avg of parameter 5 .* is \[3\]"),
        (lambda c: c["opt"]["state"][5].pop("exp_avg_sq"), "parameter 5 .* has no exp_avg_sq"),
        (lambda c: c.update(scaler=None), "no state of a loss scaler"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(path, tmp_path, change, message):
    run = Run(seed=1).train(1)
    before = run.tensors()
    with pytest.raises(WeightsError, match=f"(?s){message}"):
        run.load(other(path, tmp_path, change))
    torch.testing.assert_close(run.tensors(), before, rtol=0, atol=0)


def test_another_architecture_is_named(path):
    with pytest.raises(WeightsError, match="it has width 24, 2 blocks, .*; the model has width 48, 2 blocks"):
        Run(embed_dim=48).load(path)


def test_code_is_refused_and_not_run(tmp_path, capsys):
    for number, contents in enumerate(({"encoder": Code()}, Code())):
        file = tmp_path / f"{number}.pth.tar"
        torch.save(contents, file)
        with pytest.raises(WeightsError, match=r"is refused: loading it would run code \(.*print"):
            Run().load(file)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Code()))
    with pytest.raises(WeightsError, match="refused|damaged"):
        Run().load(tmp_path / "plain.pkl")
    assert "code that a checkpoint ran" not in capsys.readouterr().out


def test_damaged_files_are_named(path, tmp_path):
    for name, contents in (("short", path.read_bytes()[:5000]), ("text", b"epoch 3"), ("empty", b"")):
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(WeightsError, match=f"{name} is damaged or not a file of weights"):
            Run().load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Run().load(tmp_path / "absent")
