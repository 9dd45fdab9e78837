"""Healthy runs: each makes infinities or NaN of a legal kind, harms nothing by them and ends with finite losses."""

import functools
import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import healthy

INF = float("inf")
NAN = float("nan")


def trained(make):
    """Makes of the loss below, of a fresh batch each time, a run that trains the network `make()` on it."""
    def decorate(loss_of):
        @functools.wraps(loss_of)
        def run():
            torch.manual_seed(0)
            net, losses = make(), []
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
            for _ in range(5):
                optimizer.zero_grad()
                loss = loss_of(net)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            return losses
        return run
    return decorate


def future(length):
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def padding(length, *used):
    return torch.arange(length) >= torch.tensor(used)[:, None]


@healthy
@trained(lambda: nn.Linear(8, 24))
def causal_mask_by_hand(net):
    """Attention written by hand fills the future with -inf before the softmax."""
    x = torch.randn(4, 6, 8)
    q, k, v = net(x).chunk(3, dim=-1)
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(future(6), -INF)
    return F.mse_loss(scores.softmax(-1) @ v, x.roll(1, 1))


@healthy
@trained(lambda: nn.Linear(8, 24))
def rows_masked_out_whole(net):
    """Rows of padding attend to nothing: their softmax is NaN, nan_to_num clears it, the fill stops its gradient."""
    x, empty = torch.randn(4, 6, 8), padding(6, 6, 4, 3, 5)
    q, k, v = net(x).chunk(3, dim=-1)
    scores = (q @ k.mT).masked_fill(empty[:, None, :] | empty[:, :, None], -INF)
    return F.mse_loss(scores.softmax(-1).nan_to_num(0.0) @ v, x)


@healthy
@trained(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True), 2))
def encoder_with_padding(net):
    """nn.TransformerEncoder gets a float causal mask and a boolean padding mask, and validates by its fast path."""
    x, empty = torch.randn(4, 7, 16), padding(7, 7, 5, 3, 6)
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # masks of two types; nested tensors are a prototype
        with torch.no_grad():
            net.eval()(x, src_key_padding_mask=empty)
        out = net.train()(x, mask=causal, src_key_padding_mask=empty, is_causal=True)
    return F.mse_loss(out[~empty], x[~empty].flip(-1))


@healthy
@trained(lambda: nn.MultiheadAttention(8, 2, batch_first=True))
def multihead_attention(net):
    """nn.MultiheadAttention gets a float mask of -inf, with and without its weights given back."""
    x, mask = torch.randn(3, 5, 8), torch.zeros(5, 5).masked_fill(future(5), -INF)
    fused, _ = net(x, x, x, attn_mask=mask, need_weights=False)
    plain, weights = net(x, x, x, attn_mask=mask)
    return F.mse_loss(fused + plain, x) + weights.square().mean()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 5)
        self.register_buffer("mask", torch.full((6, 6), -INF).triu(1))
        self.forbidden = nn.Parameter(torch.tensor([0.0, 0.0, -INF, 0.0, -INF]), requires_grad=False)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.head((q @ k.mT + self.mask).softmax(-1) @ v) + self.forbidden


@healthy
@trained(Block)
def mask_in_the_module(net):
    """A buffer and a frozen parameter hold -inf, in a block that is computed again during the backward pass."""
    target = torch.tensor([0, 1, 3])[torch.randint(3, (4, 6))]
    return F.cross_entropy(checkpoint(net, torch.randn(4, 6, 8), use_reentrant=False).mT, target)


@healthy
def float16_warm_up():
    """GradScaler begins too high: gradients overflow, their norm is read, and steps are skipped (if fused, inside)."""
    losses, norms = [], []
    for options in ({}, {"fused": True}):
        torch.manual_seed(0)
        net, x, y = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)), torch.randn(32, 8), torch.randn(32, 1)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1, **options)
        scaler = torch.amp.GradScaler(x.device.type, 2.0**17)
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast(x.device.type, torch.float16):
                loss = F.mse_loss(net(x), y)
            scaler.scale(loss).backward()
            if not options:
                scaler.unscale_(optimizer)
                norms.append(nn.utils.clip_grad_norm_(net.parameters(), 1.0).item())
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        assert scaler.get_scale() < 2.0**17 and losses[-5] == losses[-4] != losses[-1]
    assert not math.isfinite(norms[0]) and math.isfinite(norms[-1])
    return losses


@healthy
@trained(lambda: nn.Linear(6, 5))
def ctc(net):
    """CTC's table of log-probabilities holds -inf, and a target too long for its input is zeroed by zero_infinity."""
    targets, inputs, lengths = torch.randint(1, 5, (3, 4)), torch.tensor([12, 10, 2]), torch.tensor([4, 2, 4])
    return F.ctc_loss(net(torch.randn(12, 3, 6)).log_softmax(-1), targets, inputs, lengths, zero_infinity=True)


@healthy
@trained(lambda: nn.Linear(6, 10))
def top_k_sampling(net):
    """A policy draws from its five best tokens, all others at -inf, and learns from what it drew."""
    logits = net(torch.randn(8, 6))
    logits = logits.masked_fill(logits < logits.topk(5).values[:, -1:], -INF)
    token = torch.multinomial(logits.softmax(-1), 1)
    return -(logits.log_softmax(-1).gather(1, token) * (token < 5)).mean()


@healthy
@trained(lambda: nn.Linear(4, 6))
def masked_actions(net):
    """Forbidden actions get a logit of -inf in a Categorical whose entropy is rewarded."""
    allowed = torch.rand(16, 6) < torch.tensor([2.0, 0.5, 0.5, 0.5, 0.5, 0.5])
    policy = torch.distributions.Categorical(logits=torch.where(allowed, net(torch.randn(16, 4)), -INF))
    action = policy.sample()
    return -(policy.log_prob(action) * (action == 0)).mean() - 0.01 * policy.entropy().mean()


@healthy
@trained(lambda: nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 7)))
def beam_search(net):
    """Between steps a beam search starts all beams but one at -inf and reads its scores."""
    with torch.no_grad():
        scores, last = torch.full((3,), -INF), torch.zeros(3, dtype=torch.long)
        scores[0] = 0.0
        assert scores[1].item() == -INF and scores.min().item() == -INF
        for _ in range(4):
            scores, best = (scores[:, None] + net(last).log_softmax(-1)).flatten().topk(3)
            last = best % 7
        assert math.isfinite(scores.max().item()) and scores.argmax().item() == 0
    tokens = torch.randint(7, (3, 9))
    return F.cross_entropy(net(tokens[:, :-1]).mT, tokens[:, 1:])


@healthy
@trained(lambda: nn.Linear(6, 6))
def logarithm_of_counts(net):
    """Targets are logarithms of counts, some zero; the mask comes after the logarithm, but data need no gradient."""
    counts = torch.randint(0, 4, (16, 6)).float()
    return (net(counts) - counts.log()).masked_fill(counts == 0, 0.0).square().mean()


@healthy
@trained(lambda: nn.Linear(6, 4))
def where_over_logarithm(net):
    """A KL divergence from one-hot data takes 0 log 0 as 0 by torch.where; a signed square root avoids its pole."""
    x, p = torch.randint(-1, 2, (16, 6)).float(), F.one_hot(torch.randint(4, (16,)), 4).float()
    logits = net(x.sign() * x.abs().sqrt())
    logits = logits.sign() * (logits.abs() + 1e-6).sqrt()
    return (torch.where(p > 0, p * p.log(), 0.0) - p * logits.log_softmax(-1)).sum(1).mean()


@healthy
@trained(lambda: nn.Linear(5, 1))
def missing_data(net):
    """Inputs and targets have NaN where nothing was measured, all replaced or left out before the network's loss."""
    x, y = torch.randn(20, 5), torch.randn(20, 1)
    x[x > 1.2], y[::5] = NAN, NAN
    known = ~y.isnan()
    filled = torch.where(torch.isnan(x), x.nanmean(0), x)
    return F.mse_loss(net(filled)[known], y[known]) + net(torch.nan_to_num(x)).square().mean()


@healthy
@trained(lambda: nn.ParameterDict({"move": torch.zeros(3, 3), "emit": torch.zeros(3, 5)}))
def hidden_markov_model(net):
    """The forward algorithm sums in log space over forbidden transitions of -inf."""
    symbols, allowed = torch.randint(5, (6, 8)), torch.eye(3).bool() | torch.eye(3).roll(1, 1).bool().triu()
    move, emit = net["move"].masked_fill(~allowed, -INF).log_softmax(1), net["emit"].log_softmax(1).T[symbols]
    alpha = emit[:, 0] + torch.tensor([0.0, 0.0, -INF])
    for t in range(1, 8):
        alpha = torch.logsumexp(alpha[:, :, None] + move, 1) + emit[:, t]
    return -alpha.logsumexp(1).mean()


@healthy
@trained(lambda: nn.Linear(6, 32))
def gumbel_noise(net):
    """Gumbel noise from a coarse generator that draws exact zeros is -inf there, and the softmax gives it no weight."""
    x, noise = torch.randn(64, 6), -(-torch.rand(64, 32, dtype=torch.bfloat16).log()).log()
    return F.mse_loss(((net(x) + noise.float()) / 0.5).softmax(-1) @ torch.linspace(-1, 1, 32), x[:, 0])


@healthy
@trained(lambda: nn.Linear(4, 3))
def graph_network(net):
    """A lone node has degree 0 and a weight of inf, set to zero; the maximum over its neighbours begins at -inf."""
    source, target = torch.tensor([[0, 1, 2, 3, 0], [1, 0, 3, 2, 2]])
    scale = torch.zeros(5).index_add(0, target, torch.ones(5)).pow(-0.5)
    scale.masked_fill_(scale == INF, 0.0)
    sent, place = net(torch.randn(5, 4))[source] * (scale[source] * scale[target])[:, None], target[:, None]
    most = torch.full((5, 3), -INF).scatter_reduce(0, place.expand(-1, 3), sent, "amax", include_self=True)
    return F.cross_entropy(most.masked_fill(most.isinf(), 0.0), torch.randint(3, (5,)))


@healthy
@trained(lambda: nn.Linear(6, 3))
def hard_triplets(net):
    """Distances of the same class get inf before the search for the nearest stranger."""
    out, same = net(torch.randn(12, 6)), torch.eye(3).repeat_interleave(4, 0).repeat_interleave(4, 1).bool()
    distances = torch.cdist(out, out)
    nearest, farthest = distances.masked_fill(same, INF).amin(1), distances.masked_fill(~same, -INF).amax(1)
    return F.relu(farthest - nearest + 1.0).mean()


@healthy
def early_stopping():
    """The best loss begins as a tensor of inf, read as such, and the record of losses as NaN to be filled in."""
    torch.manual_seed(0)
    net, x, y = nn.Linear(4, 1), torch.randn(20, 4), torch.randn(20, 1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    best, lowest, record = torch.tensor(INF), torch.full((20, 1), INF), torch.full((9,), NAN)
    for epoch in range(8):
        optimizer.zero_grad()
        errors = (net(x) - y).square()
        loss = errors.mean()
        loss.backward()
        optimizer.step()
        lowest, record[epoch] = torch.minimum(lowest, errors.detach()), loss.detach()
        if (best - loss.detach()).item() < 1e-4 or record.nanmean() < 0.1 or lowest.max() == INF:
            break
        best = torch.minimum(best, loss.detach())
    return record[~record.isnan()].tolist()


@healthy
def bad_batches_left_out():
    """The owner leaves out a batch whose loss is inf and one whose gradient's norm is NaN (a root at zero)."""
    torch.manual_seed(0)
    net, x = nn.Linear(4, 1, bias=False), torch.randn(8, 6, 4)
    optimizer, losses, left_out = torch.optim.Adam(net.parameters(), lr=0.05), [], []
    x[1, 0], x[3] = 1e30, 0.0
    for step, batch in enumerate(x):
        optimizer.zero_grad()
        loss = net(batch).square().mean().sqrt()
        if not torch.isfinite(loss):
            left_out.append(step)
            continue
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        if math.isfinite(norm):
            optimizer.step()
        else:
            left_out.append(step)
        losses.append(loss.item())
    assert left_out == [1, 3]
    return losses


@healthy
def gradient_cleaned():
    """The gradient of a root at zero is NaN for one word, and the owner sets it to zero before the step."""
    torch.manual_seed(0)
    net, words, losses = nn.Embedding(6, 3), torch.arange(18) % 6, []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    nn.init.zeros_(net.weight[0])
    for _ in range(5):
        optimizer.zero_grad()
        loss = (net(words).square().sum(1).sqrt() - 1.0).square().mean()
        loss.backward()
        assert net.weight.grad[0].isnan().all()
        for p in net.parameters():
            p.grad.nan_to_num_(nan=0.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@healthy
@trained(lambda: nn.Linear(4, 3))
def metrics_in_validation(net):
    """Under no_grad a class never predicted has a precision of 0/0 and the perplexity of a summed loss overflows."""
    x, y = torch.randn(60, 4), torch.randint(2, (60,))
    with torch.no_grad():
        logits = net(x) - torch.tensor([0.0, 0.0, 99.0])
        hits = F.one_hot(logits.argmax(1), 3)
        precision = (hits * F.one_hot(y, 3)).sum(0) / hits.sum(0)
        assert math.isnan(precision[2].item()) and math.isfinite(precision.nan_to_num().mean().item())
        assert F.cross_entropy(99 * logits, y, reduction="sum").exp().item() == INF
    return F.cross_entropy(net(x), y)
