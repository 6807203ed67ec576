"""Multi-tensor kernels in Triton's interpreter: grad_norm, ema_ and adamw_ema_ against fp64, and their tables.

Tolerances count roundings: u is half a unit in the last place of 1, and each bound below is a sum over the operations
of the kernel of u times the magnitude that is rounded there.
"""

import inspect
import itertools
from dataclasses import dataclass, fields

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from kernel_testing import LastProgram, huge, interpreted
from torch import Tensor
from torch._subclasses import FakeTensorMode

from ijepa_fast import ops
from ijepa_fast.kernels import adamw_ema, ema, grad_norm, multi_tensor

SETTINGS = torch.tensor([[1e-2, 0.9, 0.999, 1e-8, 0.1], [3e-3, 0.5, 0.95, 1e-6, 0.0]], dtype=torch.float64)
MOMENTUM = torch.tensor(0.99, dtype=torch.float64)
YES, NO = torch.tensor(True), torch.tensor(False)
# (masters, gradients and copies)
PRECISIONS = [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float32, torch.float16)]


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def normal(shape, dtype, generator, aligned: bool = True) -> Tensor:
    """Random values; unaligned ones start one element behind a multiple of 16 bytes."""
    count = torch.Size(shape).numel()
    buffer = torch.randn(count + 1, generator=generator, dtype=torch.float64).to(dtype)
    return (buffer[:count] if aligned else buffer[1:]).view(shape)


@dataclass
class Lists:
    """The lists of one adamw_ema_ call."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    copies: list[Tensor]
    emas: list[Tensor]
    ema_copies: list[Tensor]
    copy_index: list[int]
    ema_index: list[int]
    ema_copy_index: list[int]
    group_index: list[int]

    def all(self) -> list[list]:
        return [getattr(self, field.name) for field in fields(self)]

    def twin(self, dtype: torch.dtype | None = None) -> "Lists":
        """A copy with its own memory."""
        return Lists(
            *([t.to(dtype or t.dtype, copy=True) for t in column] for column in self.all()[:7]), *self.all()[7:]
        )


def draw_lists(shapes, wide, low, seed, unaligned=()) -> Lists:
    """Tensors of these shapes; which have a copy, an EMA and an EMA copy, and low-precision gradients, is drawn."""
    generator = torch.Generator().manual_seed(seed)
    lists = Lists(*([] for _ in fields(Lists)))

    def add(tensors, places, shape, dtype, wanted, aligned):
        places.append(len(tensors) if wanted else -1)
        if wanted:
            tensors.append(normal(shape, dtype, generator, aligned))

    for i, shape in enumerate(shapes):
        aligned = i not in unaligned
        choice = [bool(x) for x in torch.randint(2, (4,), generator=generator)]
        lists.params.append(normal(shape, wide, generator, aligned))
        lists.grads.append(normal(shape, low if choice[0] else wide, generator, aligned))
        lists.exp_avgs.append(normal(shape, wide, generator, aligned))
        lists.exp_avg_sqs.append(normal(shape, wide, generator, aligned).square_())
        add(lists.copies, lists.copy_index, shape, low, choice[1], aligned)
        add(lists.emas, lists.ema_index, shape, wide, choice[2], aligned)
        add(lists.ema_copies, lists.ema_copy_index, shape, low, choice[2] and choice[3], aligned)
        lists.group_index.append(int(torch.randint(2, (), generator=generator)))
    return lists


# Around the bounds of a block (1,024) and of what divides evenly (16); empty; one element; matrices.
lengths = st.sampled_from([0, 1, 7, 16, 48, 1023, 1024, 1025, 1040])
shapes = st.lists(lengths.map(lambda n: (n,)) | st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)
seeds = st.integers(0, 2**31)


def check_update(before: Lists, after: Lists, steps, scale: float, roundings: int = 13) -> None:
    """``after`` is one step of AdamW and EMA from ``before``, within rounding.

    Args:
        roundings: between the second moment and the size of the step. 13 if square roots and quotients are exact to
            half a unit; on a GPU Triton's three quotients and two roots are off by up to two units: 3 * 3 + 2 * 2 more.
    """
    exact = before.twin(torch.float64)
    ops.adamw_ema_.definition(*exact.all(), SETTINGS, steps, MOMENTUM, torch.tensor(scale), YES)
    for i, param in enumerate(before.params):
        u = unit(param.dtype) * (2 if param.dtype == torch.float64 else 1)  # the reference rounds as well
        lr, beta1, beta2, eps, _ = SETTINGS[before.group_index[i]].tolist()
        grad, n = before.grads[i].double().abs() * scale, float(steps[i])
        rate = lr / (1 - beta1**n)
        denominator = (exact.exp_avg_sqs[i] / (1 - beta2**n)).sqrt() + eps
        moved = rate * exact.exp_avgs[i].abs() / denominator
        exp_avg_error = 5 * u * (before.exp_avgs[i].double().abs() + grad)
        param_error = 3 * u * param.double().abs() + (3 + roundings) * u * moved + rate / denominator * exp_avg_error
        assert_within(after.exp_avgs[i], exact.exp_avgs[i], exp_avg_error)
        assert_within(after.exp_avg_sqs[i], exact.exp_avg_sqs[i], 7 * u * exact.exp_avg_sqs[i])
        assert_within(after.params[i], exact.params[i], param_error)
        if (place := before.copy_index[i]) >= 0:
            assert torch.equal(after.copies[place], after.params[i].to(after.copies[place].dtype))
        if (place := before.ema_index[i]) >= 0:
            magnitude = before.emas[place].double().abs() + exact.params[i].abs()
            assert_within(after.emas[place], exact.emas[place], param_error + 4 * u * magnitude)
            if (copy_place := before.ema_copy_index[i]) >= 0:
                copy = after.ema_copies[copy_place]
                assert torch.equal(copy, after.emas[place].to(copy.dtype))
        assert torch.equal(after.grads[i], before.grads[i])


def assert_within(actual: Tensor, exact: Tensor, error: Tensor) -> None:
    difference = (actual.double() - exact).abs()
    assert (difference <= error).all(), f"{(difference - error).max():.3g} beyond the bound"


@pytest.mark.parametrize(("wide", "low"), PRECISIONS)
@interpreted
@given(shapes, seeds, st.integers(1, 2000))
@example([(0,)], 0, 1)
@example([(1,), (1024,)], 1, 1)
def test_adamw_ema(wide, low, shapes, seed, step):
    before = draw_lists(shapes, wide, low, seed, unaligned={1})
    after, steps = before.twin(), torch.arange(len(shapes)) + float(step)
    adamw_ema.adamw_ema_(*after.all(), SETTINGS, steps, MOMENTUM, torch.tensor(0.5), YES)
    check_update(before, after, steps, 0.5)


def test_adamw_ema_that_does_not_apply_touches_nothing():
    before = draw_lists([(40,), (3,)], torch.float32, torch.float16, 0)
    before.grads[0][3] = float("nan")
    after = before.twin()
    adamw_ema.adamw_ema_(*after.all(), SETTINGS, torch.ones(2), MOMENTUM, torch.tensor(1.0), NO)
    for column, untouched in zip(after.all()[:7], before.all()[:7], strict=True):
        for a, b in zip(column, untouched, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("target", "source"), [*PRECISIONS, (torch.float16, torch.float32)])
@interpreted
@given(shapes, seeds)
@example([(0,)], 0)
@example([(2049,)], 0)
def test_ema(target, source, shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    targets = [normal(shape, target, generator, aligned=i != 1) for i, shape in enumerate(shapes)]
    sources = [normal(shape, source, generator, aligned=i != 1) for i, shape in enumerate(shapes)]
    exact = [t.double() for t in targets]
    ops.ema_.definition(exact, sources, MOMENTUM)
    before = [t.clone() for t in targets]
    ema.ema_(targets, sources, MOMENTUM)
    wide = torch.promote_types(target, torch.float32)
    for actual, wanted, old, new in zip(targets, exact, before, sources, strict=True):
        magnitude = old.double().abs() + new.double().abs()
        # fp16 rounds the result once more; subnormal numbers by half their spacing.
        last = 0 if target == wide else unit(target) * wanted.abs() + torch.finfo(target).smallest_normal * unit(target)
        assert_within(actual, wanted, 8 * unit(wide) * magnitude + last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@interpreted
@given(shapes, seeds)
@example([(0,)], 0)
@example([(8193,)], 0)
def test_grad_norm(dtype, shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    grads = [normal(shape, dtype, generator, aligned=i != 1) for i, shape in enumerate(shapes)]
    actual = grad_norm.grad_norm(grads)
    exact = ops.grad_norm.definition([g.double() for g in grads])
    assert actual.dtype == torch.promote_types(dtype, torch.float32)
    # 32 terms per thread, 8 warps of 32 threads and a few rounds of partial sums, each rounded once; half of it
    # remains under the root.
    assert_within(actual, exact, 64 * unit(actual.dtype) * exact)


def test_grad_norm_of_several_dtypes_is_wide():
    grads = [torch.full((3,), 2.0).half(), torch.full((2,), 1e-9, dtype=torch.float64), torch.full((1,), 2.0)]
    actual = grad_norm.grad_norm(grads)
    assert actual.dtype == torch.float64 and actual == pytest.approx(4.0)


def test_grad_norm_of_more_blocks_than_a_round_takes():
    assert grad_norm._root_of_sum(torch.ones(2 * 8192 + 3)) == pytest.approx((2 * 8192 + 3) ** 0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_grad_norm_of_anything_that_is_not_finite_is_not_finite(bad):
    grads = [torch.ones(17), torch.ones(40)]
    grads[1][39] = bad
    assert not grad_norm.grad_norm(grads).isfinite()


def test_tables_are_used_while_they_fit_and_replaced_when_tensors_move():
    targets, sources = [torch.zeros(20), torch.zeros(3)], [torch.ones(20), torch.ones(3).half()]
    tensors, programs = ema.tables(targets, sources)
    columns = multi_tensor.Columns((targets, sources), (None, None))
    block = ema.CONFIGS["sm_90"].block
    assert multi_tensor.fit("ema_", tensors, programs, columns, block)[:2] == (tensors, programs)
    assert [tensors.shape, programs.tolist()] == [(2, 5), [[0, 0], [1, 0]]]
    moved = [torch.ones(20), torch.full((3,), 2.0)]  # elsewhere, and the second of another dtype
    ema.ema_(targets, moved, torch.tensor(0.5), tensors, programs)
    assert targets[0].eq(0.5).all() and targets[1].eq(1).all() and sources[0].eq(1).all()
    larger = [torch.zeros(4096), torch.zeros(3)]
    ema.ema_(larger, [torch.ones(4096), torch.ones(3)], torch.tensor(0.5), tensors, programs)
    assert larger[0].eq(0.5).all() and larger[1].eq(0.5).all()


def test_tables_say_which_tensors_are_aligned():
    """The interpreter reads unaligned vectors as well; a GPU does not."""
    generator = torch.Generator().manual_seed(0)
    aligned, unaligned = (
        [normal((64,), torch.float32, generator, flag) for flag in flags] for flags in ([1, 1], [1, 0])
    )
    tensors, _ = ema.tables([*aligned, *unaligned], [*unaligned, *aligned])
    assert [int(kind) % 2 for kind in tensors[:, 3]] == [1, 0, 1, 0]


def test_moved_tensors_are_refused_while_a_graph_is_captured(monkeypatch):
    """Seen through a stand-in for a CUDA device: what is compared are addresses, wherever they are."""
    targets, sources = [torch.zeros(20)], [torch.ones(20)]
    tensors, programs = ema.tables(targets, sources)
    monkeypatch.setattr(multi_tensor.Columns, "device", property(lambda _: torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    ema.ema_(targets, sources, torch.tensor(0.5), tensors, programs)
    assert targets[0].eq(0.5).all()
    with pytest.raises(RuntimeError, match="ema_: tensors lie elsewhere than when its tables were built"):
        ema.ema_(targets, [torch.ones(20)], torch.tensor(0.5), tensors, programs)


def test_elements_in_another_order_are_averaged_if_both_have_it_and_refused_otherwise():
    target, source = torch.zeros(4, 6).T, torch.arange(24.0).view(4, 6).T
    ema.ema_([target], [source], torch.tensor(0.5))
    assert torch.equal(target, source / 2)
    with pytest.raises(ValueError, match=r"tensor 0 must lie in memory .* list 0 has \(6, 4\) with strides \(1, 6\)"):
        ema.ema_([target], [source.contiguous()], torch.tensor(0.5))
    with pytest.raises(ValueError, match="without gaps"):
        ema.ema_([torch.zeros(8)[::2]], [torch.zeros(8)[::2]], torch.tensor(0.5))


def test_kinds_have_a_body_each_and_blocks_find_their_tensor():
    """Every combination of presence and precision in one launch, more blocks than tensors."""
    kinds = list(itertools.product([torch.float32, torch.float16], [False, True], ["", "ema", "ema and copy"]))
    lists = Lists(*([] for _ in fields(Lists)))
    generator = torch.Generator().manual_seed(0)
    for i, (low, copy, average) in enumerate(kinds):
        shape = (32 + 1024 * (i % 2),)
        lists.params.append(normal(shape, torch.float32, generator))
        lists.grads.append(normal(shape, low, generator))
        lists.exp_avgs.append(torch.zeros(shape))
        lists.exp_avg_sqs.append(torch.zeros(shape))
        for wanted, tensors, places, dtype in (
            (copy, lists.copies, lists.copy_index, torch.float16),
            (average, lists.emas, lists.ema_index, torch.float32),
            (average == "ema and copy", lists.ema_copies, lists.ema_copy_index, torch.float16),
        ):
            places.append(len(tensors) if wanted else -1)
            if wanted:
                tensors.append(normal(shape, dtype, generator))
        lists.group_index.append(i % 2)
    after, steps = lists.twin(), torch.ones(len(kinds))
    tensors, programs = adamw_ema.tables(*after.all())
    assert len(tensors.built_for[0].kinds) == len(kinds) and len(programs) == 18
    adamw_ema.adamw_ema_(*after.all(), SETTINGS, steps, MOMENTUM, torch.tensor(1.0), YES, tensors, programs)
    check_update(lists, after, steps, 1.0)


def test_offsets_beyond_int32(monkeypatch):
    monkeypatch.setattr(ema, "ema_kernel", LastProgram(ema.ema_kernel, monkeypatch))
    target, source = (huge(2**20 + 1, 2048, torch.float16) for _ in range(2))
    source[-1], source[0] = 4, 1
    ema.ema_([target], [source], torch.tensor(0.5))
    assert target[-1].eq(2).all() and target[0].eq(0).all()


def test_offsets_beyond_int32_in_adamw(monkeypatch):
    monkeypatch.setattr(adamw_ema, "adamw_ema_kernel", LastProgram(adamw_ema.adamw_ema_kernel, monkeypatch))
    params, grads, exp_avgs, exp_avg_sqs, averages = (huge(2**20 + 1, 2048, torch.float32) for _ in range(5))
    grads[-1] = 1
    lists = [[params], [grads], [exp_avgs], [exp_avg_sqs], [], [averages], [], [-1], [0], [-1], [0]]
    adamw_ema.adamw_ema_(*lists, SETTINGS, torch.ones(1), torch.tensor(0.5), torch.tensor(1.0), YES)
    # Adam's first step has length lr.
    torch.testing.assert_close(params[-1, -1024:], torch.full((1024,), -0.01))
    torch.testing.assert_close(averages[-1, -1024:], torch.full((1024,), -0.005))
    assert params[0].eq(0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": [torch.zeros(4, dtype=torch.int32)]}, "list 1 is torch.int32; supported are float32, float64,"),
        ({"grads": [torch.zeros(2, 2)]}, r"list 0 has \(4,\) with strides \(1,\), list 1 \(2, 2\)"),
        ({"grads": []}, "list 0 holds 1 tensors, list 1 is not as long"),
        ({"grads": [torch.zeros(4, device="meta")]}, "tensor 0 is on cpu in list 0 and on meta in list 1"),
        ({"params": [torch.zeros(4).half()]}, "params must be float32 or float64 masters, got float16"),
        ({"exp_avgs": [torch.zeros(4).half()]}, "exp_avgs must have the dtype of params, float32, got float16"),
        ({"ema_index": [-1]}, "an EMA copy is given for a parameter without EMA"),
    ],
)
def test_unsupported_arguments_raise(change, message):
    columns = {name: [torch.zeros(4)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "copies", "emas")}
    columns["ema_copies"] = [torch.zeros(4).half()]
    places = {name: [0] for name in ("copy_index", "ema_index", "ema_copy_index", "group_index")}
    arguments = {**columns, **places, **change}
    with pytest.raises(ValueError, match=message):
        adamw_ema.adamw_ema_(*arguments.values(), SETTINGS, torch.ones(1), MOMENTUM, torch.tensor(1.0), YES)


@pytest.mark.parametrize(
    ("name", "module"), [("grad_norm", grad_norm), ("ema_", ema), ("adamw_ema_", adamw_ema)], ids=lambda x: str(x)[:10]
)
def test_reference_kernel_and_op_have_one_signature(name, module):
    schema = getattr(ops, name)._opoverload._schema
    wanted = [argument.name for argument in schema.arguments]
    assert list(inspect.signature(getattr(module, name)).parameters) == wanted
    assert list(inspect.signature(getattr(ops, name).definition).parameters) == wanted
    assert torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "CUDA")


def test_ops_survive_torch_compile():
    """Tensors that are changed in place, and only in place: a compiler that missed that would drop the calls."""
    lists = draw_lists([(9,), (3, 4)], torch.float32, torch.float16, 3)
    expected, compiled = lists.twin(), lists.twin()

    def step(*columns):
        norm = ops.grad_norm(columns[1])
        ops.adamw_ema_(*columns, *lists.all()[7:], SETTINGS, torch.ones(2), MOMENTUM, norm.reciprocal(), norm < 1e30)
        ops.ema_(columns[0], columns[2], MOMENTUM)
        return norm

    norms = [step(*expected.all()[:7])]
    torch.compiler.reset()
    norms.append(torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled.all()[:7]))
    assert norms[0] == norms[1] and not torch.equal(expected.params[0], lists.params[0])
    for ours, theirs in zip(compiled.all()[:7], expected.all()[:7], strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_fake_cuda_tensors_need_no_gpu():
    lists = draw_lists([(9,), (3, 4)], torch.float32, torch.float16, 3)
    with FakeTensorMode():

        def fake(tensor):
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

        columns = [[fake(t) for t in column] for column in lists.all()[:7]]
        norm = ops.grad_norm(columns[1])
        assert (norm.device.type, norm.shape, norm.dtype) == ("cuda", (), torch.float32)
        assert ops.grad_norm([norm.double(), norm]).dtype == torch.float64
        scalars = map(fake, (SETTINGS, torch.ones(2), MOMENTUM, MOMENTUM, YES))
        assert ops.adamw_ema_(*columns, *lists.all()[7:], *scalars) is None
        assert ops.ema_(columns[0], columns[2], fake(MOMENTUM)) is None


def test_opcheck():
    lists = draw_lists([(9,), (3, 4)], torch.float32, torch.float16, 3)
    steps, scale = torch.ones(2), torch.tensor(1.0)
    torch.library.opcheck(ops.adamw_ema_, (*lists.all(), SETTINGS, steps, MOMENTUM, scale, YES))


def copy_to_gpu(tensor: Tensor) -> Tensor:
    """With the alignment that the tensor has."""
    aligned = tensor.data_ptr() % 16 == 0
    room = torch.empty(tensor.numel() + (not aligned), dtype=tensor.dtype, device="cuda")
    return room[int(not aligned) :].view(tensor.shape).copy_(tensor)


def on_gpu(lists: Lists) -> Lists:
    return Lists(*(list(map(copy_to_gpu, column)) for column in lists.all()[:7]), *lists.all()[7:])


REAL_SHAPES = [(1280, 1280), (5120, 1280), (1280,), (3840,), (1280, 588), (1, 1, 384), (1000, 1281), (7,)]


@pytest.mark.gpu
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_adamw_ema_on_a_gpu(low):
    before = draw_lists(REAL_SHAPES, torch.float32, low, 0, unaligned={2, 3})
    steps = torch.arange(len(REAL_SHAPES)) + 1.0
    results = []
    for _ in range(10):
        after = on_gpu(before)
        adamw_ema.adamw_ema_(
            *after.all(), SETTINGS.cuda(), steps.cuda(), MOMENTUM.cuda(), torch.tensor(0.5).cuda(), YES.cuda()
        )
        results.append(Lists(*([t.cpu() for t in column] for column in after.all()[:7]), *after.all()[7:]))
    check_update(before, results[0], steps, 0.5, roundings=26)
    for other in results[1:]:
        for column, again in zip(results[0].all()[:7], other.all()[:7], strict=True):
            assert all(map(torch.equal, column, again))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grad_norm_and_ema_on_a_gpu(dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [copy_to_gpu(normal(shape, dtype, generator, aligned=i != 1)) for i, shape in enumerate(REAL_SHAPES)]
    norms = [grad_norm.grad_norm(tensors) for _ in range(10)]
    exact = ops.grad_norm.definition([t.cpu().double() for t in tensors])
    assert_within(norms[0].cpu(), exact, 64 * unit(torch.float32) * exact)
    assert all(torch.equal(norms[0], norm) for norm in norms)
    targets = [torch.randn(t.shape, device="cuda") for t in tensors]
    expected = [t.cpu().double() for t in targets]
    ops.ema_.definition(expected, [t.cpu() for t in tensors], MOMENTUM)
    ema.ema_(targets, tensors, MOMENTUM.cuda())
    for actual, wanted, source in zip(targets, expected, tensors, strict=True):
        magnitude = wanted.abs() + source.cpu().double().abs()
        assert_within(actual.cpu(), wanted, 8 * unit(torch.float32) * magnitude)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_in_a_cuda_graph_follows_the_eager_one_without_a_sync(dtype):
    from ijepa_fast.optim import FusedAdamW

    def make():
        torch.manual_seed(0)
        module, average = (torch.nn.Linear(70, 50).to("cuda", dtype) for _ in range(2))
        settings = {"lr": 0.01, "momentum": 0.9, "max_grad_norm": 0.5, "flat_gradients": True}
        return module, average, FusedAdamW(module.parameters(), ema=average.parameters(), **settings)

    def give_gradients(module, step):
        generator = torch.Generator().manual_seed(step)
        for parameter in module.parameters():
            parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))
        if step == 4:
            module.bias.grad[3] = float("inf")

    def schedule(optimizer, step):
        optimizer.momentum = 0.9 + 0.01 * step
        optimizer.param_groups[0].update(lr=0.01 / (step + 1), weight_decay=0.1 * step)

    (eager, eager_average, expected), (graphed, graphed_average, optimizer) = make(), make()
    side = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    for step in range(7):
        for module, taken in ((eager, expected), (graphed, optimizer)):
            give_gradients(module, step)
            schedule(taken, step)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            expected.step()
            if step < 2:
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    optimizer.step()
                torch.cuda.current_stream().wait_stream(side)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if step >= 2:
            if step == 2:
                with torch.cuda.graph(graph):
                    optimizer.step()
            optimizer.upload_scalars()
            graph.replay()
    for module, other in ((eager, graphed), (eager_average, graphed_average)):
        assert all(map(torch.equal, module.parameters(), other.parameters()))
    assert int(expected.skipped) == int(optimizer.skipped) == 1
    optimizer.param_groups[0]["params"][0].grad = torch.zeros_like(graphed.weight)
    with pytest.raises(RuntimeError, match="tensors lie elsewhere"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
