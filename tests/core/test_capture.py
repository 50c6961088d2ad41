import copy
import warnings
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from headwater.core.capture import (
    Accumulator,
    BatchInfo,
    BatchPlan,
    Capture,
    LayerError,
    plan_batches,
    run_batch,
    sweep,
)
from headwater.core.checkpoint import Checkpoint
from headwater.core.examples import DatasetExamples, TensorExamples, take
from headwater.core.follow import follow
from headwater.core.layers import FUNCTIONAL
from headwater.core.target import Drawn, DrawnSeveral, Enumerated, Loss, Measured
from headwater.core.task import CausalLM, Classification, FunctionTask
from headwater.numerics import kronecker
from tests.cases import (
    CASES,
    CLASSES,
    Net,
    QuantizedLinear,
    assert_same,
    autograd,
    gradients,
    labels,
    mlp,
    mlp_data,
    numbers,
)

TASK = Classification()
FLOAT32 = 1e-6  # norms and rotations of transformers run in float32, whatever the model's type


class Total(Accumulator):
    """The weighted sum of all gradients, of their squares, and how many there were."""

    def __init__(self):
        self.state = {}

    def _add(self, name, value):
        self.state[name] = self.state.get(name, 0.0) + value

    def update(self, rows):
        weights = rows.batch.weights
        weights = torch.ones(len(rows.batch.indices)) if weights is None else weights
        dense = kronecker.gradient(rows.a, rows.g).movedim(-3, 0)
        for name, x in rows.layer.to_parameters(dense).items():
            self._add(name, torch.tensordot(weights.double(), x, 1))
            self._add(f"{name} squared", torch.tensordot(weights.double(), x.square(), 1))

    def end_batch(self, batch):
        self._add("n", torch.tensor(batch.n_examples, dtype=torch.float64))

    def merge(self, other):
        for name, value in other.state.items():
            self._add(name, value)

    def tensors(self):
        return self.state

    def load(self, tensors):
        self.state = tensors


def swept(model, task, examples, target=None, batches=None, **options):
    followed = follow(model, task, examples.batch([0, 1]))
    total = Total()
    capture = Capture(model, task, followed)
    sweep(capture, examples, [total], target or Loss(), batches=batches, **options)
    return total.state


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Using padding='same'")
def test_gradients_of_every_kind_of_layer_are_those_of_autograd(name):
    model, task, batch = CASES[name].make()
    followed = follow(model, task, batch)
    actual = gradients(model, task, batch, followed)
    by_func = {n for layer in followed if layer.kind == FUNCTIONAL for n in layer.parameters}
    assert by_func == set(CASES[name].functional)
    assert {x.name for x in followed.left_out} == set(CASES[name].left_out)
    assert_same(actual, autograd(model, task.loss, batch, actual))


@pytest.mark.parametrize("name", ["three times", "embedding", "conv2d groups", "attention"])
def test_a_batch_of_one_example_is_enough_to_choose_layers_and_to_capture(name):
    model, task, batch = CASES[name].make()
    one = take(batch, torch.tensor([1]))
    actual = gradients(model, task, one, follow(model, task, one))
    assert_same(actual, autograd(model, task.loss, one, actual))


def test_an_unbatched_convolution_has_the_gradient_of_autograd():
    model = Net(
        lambda self, x: self.head(self.c(x[0]).tanh().mean((1, 2)))[None],
        c=nn.Conv2d(2, 6, 3, groups=2),
        head=nn.Linear(6, CLASSES),
    ).double()
    batch = torch.randn(1, 2, 5, 5, dtype=torch.float64), torch.tensor([1])
    followed = follow(model, TASK, batch, prove=False)  # the proof would double the batch
    assert_same(gradients(model, TASK, batch, followed), autograd(model, TASK.loss, batch))


def test_only_biases_can_be_followed():
    model, task, batch = CASES["group norm"].make()
    followed = follow(model, task, batch, layers=["*.bias"])
    assert {layer.kind for layer in followed} == {"bias"}
    actual = gradients(model, task, batch, followed)
    assert set(actual) == {"body.0.bias", "body.1.bias", "head.bias"}
    assert_same(actual, autograd(model, task.loss, batch, actual))


def test_only_gains_can_be_followed():
    model, task, batch = CASES["layer norm"].make()
    followed = follow(model, task, batch, layers="body.1.weight")
    assert [(layer.kind, layer.shape) for layer in followed] == [("norm", (1, 6, 1))]
    actual = gradients(model, task, batch, followed)
    assert_same(actual, autograd(model, task.loss, batch, ["body.1.weight"]))


def test_modules_that_read_the_same_tensor_are_handed_the_same_rows():
    model = Net(
        lambda self, x: self.head((self.q(x) * self.k(x)).sum(1)),
        q=nn.Linear(5, 6),
        k=nn.Linear(5, 6),
        head=nn.Linear(6, CLASSES),
    ).double()
    batch = numbers(3, 5)
    followed = follow(model, TASK, batch)
    assert [layer.input_group for layer in followed] == ["q", "q", "head"]
    seen, capture = {}, Capture(model, TASK, followed)
    with capture.hooks():
        info = BatchInfo(torch.arange(4))
        capture.backward(
            batch, Loss(), info, torch.arange(4), lambda r: seen.update({r.layer.name: r.a})
        )
    assert seen["q"] is seen["k"]


def test_routed_tokens_are_followed_one_example_at_a_time():
    def run(self, x):  # a mixture of experts: tokens go to one of two layers
        flat = x.flatten(0, 1)
        out, left = torch.zeros_like(flat), flat[:, 0] > 0
        out[left] = self.a(flat[left]).tanh()
        out[~left] = self.b(flat[~left]).tanh()
        return self.head(out.view_as(x).sum(1))

    model = Net(run, a=nn.Linear(6, 6), b=nn.Linear(6, 6), head=nn.Linear(6, CLASSES)).double()
    batch = numbers(6, 6)
    followed = follow(model, TASK, batch)
    with pytest.warns(UserWarning, match="one example at a time"):
        actual = gradients(model, TASK, batch, followed)
    assert_same(actual, autograd(model, TASK.loss, batch))


def test_control_flow_that_depends_on_the_data_is_followed_one_example_at_a_time():
    def run(self, x):
        h = self.a(x)
        return h * self.gain if bool(h.sum() > 0) else h * self.gain.exp()

    model = Net(run, a=nn.Linear(5, CLASSES), gain=nn.Parameter(torch.randn(CLASSES))).double()
    x = torch.randn(1, 5, dtype=torch.float64).expand(4, -1) * torch.tensor([[1], [2], [3], [4.0]])
    batch = x, labels()
    followed = follow(model, TASK, batch)
    capture, found = Capture(model, TASK, followed), {}
    for _ in range(2):  # the second batch goes straight to the slow path, without a second warning
        with warnings.catch_warnings(record=True) as caught, capture.hooks():
            warnings.simplefilter("always")
            info, keys = BatchInfo(torch.arange(4)), torch.arange(4)
            capture.backward(batch, Loss(), info, keys, lambda r: found.update({r.layer.name: r.g}))
    assert not caught
    expected = autograd(model, TASK.loss, batch)["gain"]
    torch.testing.assert_close(found["gain"].squeeze(1), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_quantized_weights_have_the_gradient_of_the_effective_weight(bias):
    model = Net(
        lambda self, x: self.head(self.q(self.a(x)).tanh().sum(1)),
        a=nn.Linear(5, 6),
        q=QuantizedLinear(6, 6, bias),
        head=nn.Linear(6, CLASSES),
    ).double()
    model.q.weight = model.q.weight.to(torch.int8)
    batch = numbers(3, 5)
    plain = copy.deepcopy(model)
    plain.q = nn.Linear(6, 6, bias).double()
    with torch.no_grad():
        plain.q.weight.copy_(model.q.dense())
        if bias:
            plain.q.bias.copy_(model.q.bias)

    unasked = follow(model, TASK, batch)
    assert [(x.name, x.numel) for x in unasked.left_out] == [("q.weight", 36)]
    followed = follow(model, TASK, batch, layers=["q.*", "a"])
    assert all(layer.kind != FUNCTIONAL for layer in followed)
    actual = gradients(model, TASK, batch, followed)
    assert_same(actual, autograd(plain, TASK.loss, batch, actual))


def test_labels_drawn_from_the_model_have_the_gradients_of_those_labels():
    model, task, (x, _) = CASES["outside modules"].make()  # hooks and torch.func see one draw
    keys, target = torch.arange(4), Drawn(seed=3)
    followed = follow(model, task, (x, labels()))
    actual = gradients(model, task, (x, labels()), followed, target)
    drawn = task.predict(model, (x, labels())).sample(keys, 3).target
    assert_same(actual, autograd(model, task.loss, (x, drawn.squeeze(1))))


def test_the_rows_of_the_exact_fisher_sum_to_it():
    model, task, batch = CASES["outside modules"].make()
    examples = TensorExamples(*batch)
    total = swept(model, task, examples, Enumerated(cut=0.0), [BatchPlan((0, 1, 2, 3), 0)])
    expected = dict.fromkeys((n for n, _ in model.named_parameters()), 0.0)
    probabilities = model(batch[0]).softmax(1).detach()
    for c in range(CLASSES):
        each = autograd(model, task.loss, (batch[0], torch.full((4,), c)))
        for name, x in each.items():
            expected[name] += torch.tensordot(probabilities[:, c], x.square(), 1)
    assert_same({n: total[f"{n} squared"] for n in expected}, expected)
    torch.testing.assert_close(total["n"], torch.tensor(4.0, dtype=torch.float64))


def test_measurements_have_their_own_gradients():
    model, task, batch = CASES["linear 3d"].make()
    actual = gradients(model, task, batch, follow(model, task, batch), Measured("margin"))

    def margin(model, batch):
        return task.predict(model, batch).margin()

    assert_same(actual, autograd(model, margin, batch))


def test_an_example_that_is_not_finite_is_named():
    examples = TensorExamples(torch.ones(6, 5), torch.zeros(6).long(), ids=list("abcdef"))
    followed = follow(mlp().float(), TASK, examples.batch([0, 1]))
    examples.tensors[0][4] = torch.nan
    with pytest.raises(FloatingPointError, match="The loss of example 'e' is nan"):
        sweep(Capture(mlp().float(), TASK, followed), examples, [Total()], Loss())


def test_a_layer_that_did_not_run_is_named():
    model = Net(
        lambda self, x: self.head(self.a(x) if x.sum() > 0 else x),
        a=nn.Linear(5, 5),
        head=nn.Linear(5, CLASSES),
    )
    ones, y = torch.ones(2, 5), torch.tensor([0, 1])
    followed = follow(model, TASK, (ones, y))
    with pytest.raises(LayerError, match="Layer 'a' did not run in this batch") as caught:
        gradients(model, TASK, (-ones, y), followed)
    assert caught.value.layer == "a"


def test_a_layer_whose_tensor_is_not_made_of_the_examples_is_named():
    def run(self, x):
        return self.head(self.a(x[: len(x) - 1 if len(x) == 4 else None]).sum(0, keepdim=True) + x)

    model = Net(run, a=nn.Linear(5, 5), head=nn.Linear(5, CLASSES))
    x, y = torch.ones(4, 5), torch.tensor([0, 1, 0, 1])
    followed = follow(model, TASK, (x[:2], y[:2]), prove=False)
    with pytest.raises(
        LayerError, match=r"layer 'a' reads, \(3, 5\), cannot be split into 4 examples"
    ):
        gradients(model, TASK, (x, y), followed)


def test_an_input_that_is_overwritten_is_refused_not_read():
    def run(self, x):
        x = x.clone()
        y = self.a(x)
        x += 1
        return y + 0 * x.sum(1, keepdim=True)

    model = Net(run, a=nn.Linear(5, CLASSES))
    batch = torch.ones(2, 5), torch.tensor([0, 1])
    followed = follow(model, TASK, batch, prove=False)
    with pytest.raises(LayerError, match="'a' read was overwritten in place"):
        gradients(model, TASK, batch, followed)


def test_one_number_an_example_is_expected():
    class Mean(Classification):
        def loss(self, model, batch):
            return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(ValueError, match=r"one number an example from the task; got shape \(\)"):
        follow(mlp(), Mean(), numbers(5))


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_as_it_was(fail):
    model, task, batch = CASES["attention"].make()
    model.train()
    model.head.eval()
    model.a.weight.requires_grad_(False)
    fused = torch.backends.mha.get_fastpath_enabled()

    def state():
        return (
            [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
            [p.grad for p in model.parameters()],
            [len(m._forward_hooks) for m in model.modules()],
            torch.backends.mha.get_fastpath_enabled(),
        )

    before = state()
    followed = follow(model, task, batch)
    capture = Capture(model, task, followed)

    def emit(rows):
        if fail:
            raise KeyboardInterrupt

    def run():
        with capture.hooks():
            capture.backward(batch, Loss(), BatchInfo(torch.arange(4)), torch.arange(4), emit)

    if fail:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
    assert state() == before
    assert before[-1] == fused


def test_nothing_is_kept_after_a_pass():
    model, task, batch = CASES["linear 3d"].make()
    capture = Capture(model, task, follow(model, task, batch))
    with capture.hooks():
        capture.backward(batch, Loss(), BatchInfo(torch.arange(4)), torch.arange(4), lambda r: None)
        tape = capture._tape
        assert not tape.calls and not tape.roots and not tape.shared


def test_what_a_layer_read_is_let_go_once_its_rows_are_handed_on():
    model, task, batch = CASES["linear 3d"].make()
    capture, calls, alive = Capture(model, task, follow(model, task, batch)), [], []

    def emit(rows):
        if not calls:  # the last layer comes first: those before it wait
            calls.extend(weakref.ref(c) for some in capture._tape.calls.values() for c in some)
        alive.append(sum(call() is not None for call in calls))

    with capture.hooks():
        capture.backward(batch, Loss(), BatchInfo(torch.arange(4)), torch.arange(4), emit)
    assert alive == [2, 1, 0]


# Masks


def masked_batch():
    """Four examples of three tokens with 4, 2, 3 and 4 real ones."""
    x, y = numbers(4, 5)
    mask = torch.arange(4)[None] < torch.tensor([[4], [2], [3], [4]])
    return {"x": x, "mask": mask, "labels": y}


def masked_net():
    def run(self, x, mask):
        h = self.a(x).tanh()
        return self.head((h * mask[..., None]).sum(1))

    return Net(run, a=nn.Linear(5, 6), head=nn.Linear(6, CLASSES)).double()


def rows_of(model, task, batch, name):
    seen = {}
    capture = Capture(model, task, follow(model, task, batch))
    with capture.hooks():
        n = len(batch["labels"])
        info = BatchInfo(torch.arange(n))
        capture.backward(
            batch, Loss(), info, torch.arange(n), lambda r: seen.update({r.layer.name: r})
        )
    return seen[name]


def masked_task(prefix=""):
    def predict(model, batch):
        return TASK.predict(model, batch)

    return FunctionTask(predict_with=predict, masks_with=lambda b: {prefix: b["mask"].bool()})


def test_padding_is_zero_in_rows_and_is_not_counted():
    model, batch = masked_net(), masked_batch()
    rows = rows_of(model, masked_task(), batch, "a")
    assert torch.equal(rows.mask, batch["mask"])
    assert rows.n_positions == 4 + 2 + 3 + 4
    assert not rows.a[~batch["mask"]].any() and not rows.g[~batch["mask"]].any()
    full = batch | {"mask": torch.ones(4, 4, dtype=torch.bool)}
    assert rows_of(model, masked_task(), full, "a").mask is None
    assert rows_of(model, masked_task("head"), batch, "a").mask is None


def test_a_mask_that_does_not_hold_for_a_layer_takes_no_gradient_away():
    def run(self, x, mask):  # all positions act on the output, whatever the mask says
        return self.head(self.a(x).tanh().sum(1))

    model, batch = Net(run, a=nn.Linear(5, 6), head=nn.Linear(6, CLASSES)).double(), masked_batch()
    rows, task = rows_of(model, masked_task(), batch, "a"), masked_task()
    assert rows.mask is None and rows.n_positions == 16
    actual = gradients(model, task, batch, follow(model, task, batch))
    assert_same(actual, autograd(model, task.loss, batch))


def test_positions_of_several_runs_are_counted_with_their_masks_and_shares():
    def run(self, x, mask):
        h = self.a(self.a(x).tanh()).tanh()
        return self.head((h * mask[..., None]).sum(1))

    model = Net(run, a=nn.Linear(5, 5), head=nn.Linear(5, CLASSES)).double()
    batch = masked_batch()
    rows = rows_of(model, masked_task(), batch, "a")
    assert rows.mask.shape == (4, 8) and rows.n_positions == 2 * 13
    half = BatchInfo(torch.arange(4), share=torch.full((4,), 0.5))
    assert type(rows)(rows.layer, rows.a, rows.g, half, rows.mask).n_positions == 13
    assert type(rows)(rows.layer, rows.a, rows.g, half).n_positions == 16


# Language models


def language_batch(lengths=(6, 3, 5), side="right", vocabulary=11):
    width = max(lengths)
    ids = torch.randint(1, vocabulary, (len(lengths), width))
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    mask = mask if side == "right" else mask.flip(1)
    labels = ids.masked_fill(~mask, -100)
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}


def tiny_llama(**options):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **options,
    )
    return transformers.LlamaForCausalLM(config).double().eval()


def tiny_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config).double().eval()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_has_the_gradients_of_its_unpadded_examples(side, tied):
    model, task = tiny_llama(tie_word_embeddings=tied), CausalLM()
    batch = language_batch(side=side)
    followed = follow(model, task, batch)
    assert followed.coverage == 1
    assert all(layer.kind != FUNCTIONAL for layer in followed)
    assert bool(followed.tied) == tied
    actual = gradients(model, task, batch, followed)
    for i, length in enumerate((6, 3, 5)):
        part = slice(length) if side == "right" else slice(6 - length, None)
        one = {k: v[[i], part] for k, v in batch.items()}
        expected = autograd(model, task.loss, one)
        assert_same({n: g[[i]] for n, g in actual.items()}, expected, FLOAT32)


def test_attention_projections_of_a_llama_share_their_input():
    model, batch = tiny_llama(), language_batch()
    groups = {x.name: x.input_group for x in follow(model, CausalLM(), batch)}
    first = "model.layers.0.self_attn.{}_proj"
    assert groups[first.format("q")] == groups[first.format("k")] == groups[first.format("v")]
    assert groups["model.layers.0.mlp.gate_proj"] == groups["model.layers.0.mlp.up_proj"]
    assert groups[first.format("o")] == first.format("o")


def test_a_gpt2_has_the_gradients_of_autograd():
    model, task, batch = tiny_gpt2(), CausalLM(), language_batch()
    followed = follow(model, task, batch)
    assert {layer.kind for layer in followed} == {"conv1d", "embedding", "linear", "norm"}
    assert followed.coverage == 1 and followed.tied == (("transformer.wte", "lm_head"),)
    actual = gradients(model, task, batch, followed)
    assert_same(actual, autograd(model, task.loss, batch))


@pytest.mark.parametrize("sampled", [Drawn(1), Enumerated(0.0)])
def test_curvature_of_a_padded_batch_is_that_of_its_examples(sampled):
    """Labels are tied to examples and scored positions, so batching and padding do not matter."""
    model, task = tiny_llama(), CausalLM()
    lengths = (4, 2, 3)
    batch = language_batch(lengths)
    rows = [{k: v[i, :n] for k, v in batch.items()} for i, n in enumerate(lengths)]

    def collate(items):
        width = max(len(i["labels"]) for i in items)
        blank = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {
            k: torch.stack([F.pad(i[k], (0, width - len(i[k])), value=v) for i in items])
            for k, v in blank.items()
        }

    examples = DatasetExamples(rows, collate=collate, lengths=lengths)
    together = swept(model, task, examples, sampled, [BatchPlan((0, 1, 2), 0)])
    alone = swept(model, task, examples, sampled, [BatchPlan((i,), 0) for i in (2, 0, 1)])
    assert_same(together, alone, FLOAT32)


def test_only_adapters_are_followed_when_the_base_is_frozen():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_llama(), config).double()
    for name, p in model.named_parameters():
        if "lora_B" in name:  # zero before training, which would make the gradients of A zero
            nn.init.normal_(p)
    task, batch = CausalLM(), language_batch()
    followed = follow(model, task, batch)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for layer in followed for n in layer.parameters} == names and len(names) == 8
    assert {layer.kind for layer in followed} == {"linear"}
    actual = gradients(model, task, batch, followed)
    assert_same(actual, autograd(model, task.loss, batch, names))


@pytest.mark.filterwarnings("ignore:torch.func cannot batch")
def test_a_sequence_to_sequence_model_has_the_gradients_of_autograd():
    transformers = pytest.importorskip("transformers")
    from headwater.core.task import Seq2Seq

    config = transformers.T5Config(
        vocab_size=11,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    model, task = transformers.T5ForConditionalGeneration(config).double().eval(), Seq2Seq()
    source, target = language_batch((4, 2, 3)), language_batch((4, 4, 2))
    batch = {k: source[k] for k in ("input_ids", "attention_mask")} | {"labels": target["labels"]}
    batch["labels"][1, 1] = -100  # not scored, but read by the positions after it
    followed = follow(model, task, batch)
    functional = {x.name.split(".")[-2] for x in followed if x.kind == FUNCTIONAL}
    assert functional == {"relative_attention_bias"}  # read by no example: (query, key) distances
    actual = gradients(model, task, batch, followed)
    assert_same(actual, autograd(model, task.loss, batch, actual), FLOAT32)
    assert followed.coverage == 1


# Sweeps


@settings(max_examples=25)
@given(
    cuts=st.sets(st.integers(1, 22), max_size=6), split=st.integers(1, 6), seed=st.integers(0, 99)
)
def test_any_split_of_the_data_merged_equals_the_whole(cuts, split, seed):
    torch.manual_seed(0)
    model, examples = mlp(), mlp_data(23)
    capture = Capture(model, TASK, follow(model, TASK, examples.batch([0, 1])))
    order = torch.randperm(23, generator=torch.Generator().manual_seed(seed)).tolist()
    edges = pairwise([0, *sorted(cuts), 23])
    plans = [BatchPlan(tuple(order[a:b]), 0) for a, b in edges]
    whole, parts = Total(), [Total() for _ in range(split)]
    sweep(capture, examples, [whole], Drawn(5), batches=[BatchPlan(tuple(range(23)), 0)])
    for i, part in enumerate(parts):
        sweep(capture, examples, [part], Drawn(5), batches=plans[i::split])
    merged = Total()
    for part in parts:
        merged.merge(part)
    assert_same(merged.state, whole.state)


@pytest.mark.parametrize("at", [1, 3, 6])
def test_an_interrupted_sweep_goes_on_to_the_same_bits(tmp_path, at):
    model, examples = mlp(), mlp_data(23)
    capture = Capture(model, TASK, follow(model, TASK, examples.batch([0, 1])))
    plans = plan_batches(examples, batch_size=3)
    expected, seen = Total(), []
    sweep(capture, examples, [expected], DrawnSeveral(2), batches=plans)

    class Interrupted(Total):
        def update(self, rows):
            if len(seen) == at and rows.layer.name == "0":
                raise KeyboardInterrupt
            super().update(rows)

    def go_on(total):
        return sweep(
            capture,
            examples,
            [total],
            DrawnSeveral(2),
            batches=plans,
            checkpoint=Checkpoint(tmp_path / "state"),
            save_every=0.0,
            note="test",
            progress=lambda done, n, note: seen.append((done, n, note)),
        )

    with pytest.raises(KeyboardInterrupt):
        go_on(Interrupted())
    assert seen[-1] == (at, 8, "test")
    resumed = Total()
    assert go_on(resumed) == 8
    assert [done for done, *_ in seen] == list(range(1, 9))  # no batch ran twice
    assert resumed.state.keys() == expected.state.keys()
    assert all(torch.equal(resumed.state[k], v) for k, v in expected.state.items())
    again = Total()
    assert go_on(again) == 8 and len(seen) == 8  # finished: nothing runs
    assert torch.equal(again.state["n"], expected.state["n"])


def test_a_sweep_that_is_told_to_stop_stays_stopped(tmp_path):
    model, examples = mlp(), mlp_data(20)
    capture = Capture(model, TASK, follow(model, TASK, examples.batch([0, 1])))
    plans = plan_batches(examples, batch_size=2)
    for _ in range(2):
        total = Total()
        done = sweep(
            capture,
            examples,
            [total],
            Loss(),
            batches=plans,
            checkpoint=Checkpoint(tmp_path),
            stop=lambda total=total: total.state["n"] >= 6,
        )
        assert done == 3 and total.state["n"] == 6


@pytest.mark.parametrize("change", ["note", "batches"])
def test_the_state_of_another_sweep_is_not_taken_up(tmp_path, change):
    model, examples = mlp(), mlp_data(8)
    capture = Capture(model, TASK, follow(model, TASK, examples.batch([0, 1])))
    for size, note in [(4, "one"), (4, "two") if change == "note" else (2, "one")]:
        total = Total()
        plans = plan_batches(examples, batch_size=size)
        options = {"batches": plans, "checkpoint": Checkpoint(tmp_path), "note": note}
        assert sweep(capture, examples, [total], Loss(), **options) == len(plans)
        assert total.state["n"] == 8


def test_an_error_while_loading_is_raised():
    examples = DatasetExamples([0] * 8, collate=lambda items: 1 / 0)
    model = mlp()
    capture = Capture(model, TASK, follow(model, TASK, numbers(5)))
    with pytest.raises(ZeroDivisionError):
        sweep(capture, examples, [Total()], Loss())


def test_run_batch_hands_on_every_part_of_a_batch():
    model, examples = mlp(), mlp_data(3)
    capture, total = Capture(model, TASK, follow(model, TASK, examples.batch([0, 1]))), Total()
    with capture.hooks():
        plan, data = BatchPlan((0, 1, 2), 0), examples.batch([0, 1, 2])
        run_batch(capture, examples, plan, data, [total], DrawnSeveral(3))
    assert total.state["n"].item() == pytest.approx(3, abs=1e-12)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    batch_size=st.integers(1, 20),
    tokens=st.integers(10, 100),
    folds=st.integers(1, 3),
)
def test_batches_hold_every_example_once_within_the_budget(lengths, batch_size, tokens, folds):
    examples = DatasetExamples(lengths, lengths=lengths)
    options = {"batch_size": batch_size, "batch_tokens": tokens, "folds": folds}
    plans = plan_batches(examples, **options)
    assert sorted(i for plan in plans for i in plan.indices) == list(range(len(lengths)))
    for plan in plans:
        width = max(lengths[i] for i in plan.indices)
        assert len(plan.indices) == 1 or len(plan.indices) * width <= tokens
        assert len(plan.indices) <= batch_size
        assert all(int(examples.keys[i]) % folds == plan.fold for i in plan.indices)


def test_examples_of_one_length_are_batched_by_number():
    plans = plan_batches(mlp_data(10), batch_size=4)
    assert [plan.indices for plan in plans] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]


def test_rows_come_in_the_precision_that_is_asked_for(monkeypatch):
    model = mlp().float()
    examples = TensorExamples(torch.randn(6, 5), torch.randint(CLASSES, (6,)))
    capture = Capture(
        model, Classification(), follow(model, Classification(), examples.batch(range(6)))
    )

    def seen(precision, engine=capture):
        kept = []

        class Types(Total):
            def update(self, rows):
                kept.append((rows.a.dtype, rows.g.dtype))

        sweep(engine.at(precision, examples), examples, [Types()], Loss())
        return {dtype for pair in kept for dtype in pair}

    assert seen("model") == {torch.float32} and seen("bfloat16") == {torch.bfloat16}
    assert seen("auto") == {torch.float32}  # too few numbers to be worth it
    monkeypatch.setattr("headwater.core.capture._LARGE", 0)
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("headwater.core.capture.has_bfloat16", lambda device, has=has: has)
        assert seen("auto") == {dtype}
        assert capture.at("auto", examples).precision == ("bfloat16" if has else "model")
