"""Deaths along sequences: states and gradients that grow with every letter, and an episode of one step."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import death


class ReLUCell(nn.Module):
    def __init__(self, inputs, hidden):
        super().__init__()
        self.i2h, self.h2h = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)

    def forward(self, x, h):
        return F.relu(self.i2h(x) + self.h2h(h))


class LanguageModel(nn.Module):
    def __init__(self, words=30, hidden=64):
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(words, 16), ReLUCell(16, hidden), nn.Linear(hidden, words)

    def forward(self, tokens):
        h = tokens.new_zeros(len(tokens), self.head.in_features, dtype=torch.float32)
        outputs = []
        for x in self.embed(tokens).unbind(1):
            h = self.cell(x, h)
            outputs.append(self.head(h))
        return torch.stack(outputs, 1)


@death(step=1, phase="forward", module="cell.h2h", operation="addmm", line="self.i2h(x) + self.h2h(h)",
       verdict="wrong scale", source="https://github.com/chenxie95/deeplearning_course_sjtu/issues/31")
def relu_rnn(cured):
    """A language model with a ReLU cell of its own, whose normal weights multiply the state by five at every word."""
    torch.manual_seed(0)
    model = LanguageModel()
    if not cured:
        nn.init.normal_(model.cell.h2h.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    text = torch.randint(30, (8, 401))
    losses = []
    for start in range(0, 400, 80):
        x, y = text[:, start:start + 80], text[:, start + 1:start + 81]
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


class Sentiment(nn.Module):
    """A tanh network without biases, so that padding on the left leaves its state at 0."""

    def __init__(self, words=50, hidden=32):
        super().__init__()
        self.words = nn.Embedding(words, hidden, padding_idx=0)
        self.recur, self.out = nn.Parameter(torch.randn(hidden, hidden) / 2.5), nn.Linear(hidden, 2)

    def forward(self, tokens):
        h = 0.1 * self.words(tokens[:, 0])
        for t in range(1, tokens.shape[1]):
            h = torch.tanh(h @ self.recur + 0.1 * self.words(tokens[:, t]))
        return self.out(h)


def left_padded(lengths):
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(tokens, lengths, strict=True):
        row[-length:] = torch.randint(1, 50, (length,))
    return tokens, torch.randint(2, (len(lengths),))


@death(step=6, phase="backward", module="", operation="mm", line="torch.tanh(h @ self.recur",
       verdict="exploding gradient", source="https://github.com/pytorch/pytorch/issues/2623")
def long_padding(cured):
    """Reviews are padded on the left; next to one of 260 words the gradient of a short one doubles at every padding."""
    torch.manual_seed(0)
    batches = [left_padded([4, 7, 5, 9]) for _ in range(8)]
    batches[5] = left_padded([4, 7, 260, 9])
    model = Sentiment()
    if cured:
        nn.init.orthogonal_(model.recur)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=1e-2)
    losses = []
    for tokens, liked in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens), liked)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if math.isnan(losses[-1]):
            break
    return losses


class CharModel(nn.Module):
    """A GRU and the logarithms of counted pairs of letters, mixed so that the variance stays."""

    def __init__(self, counts, share=0.02):
        super().__init__()
        letters = len(counts)
        self.embed, self.pairs = nn.Embedding(letters, 16), nn.Embedding.from_pretrained(counts.log())
        self.rnn, self.fc = nn.GRU(16, 24, batch_first=True), nn.Linear(24, letters)
        self.share = nn.Parameter(torch.tensor(share))

    def forward(self, letters, state):
        hidden, state = self.rnn(self.embed(letters), state)
        return torch.sqrt(self.share) * self.pairs(letters) + torch.sqrt(1 - self.share) * self.fc(hidden), state


@death(step=4, phase="backward", module="", operation="div", line="torch.sqrt(self.share) * self.pairs(letters)",
       verdict="infinite slope", source="https://github.com/thu-ml/tianshou/issues/19")
def clipped_infinity(cured):
    """A character model holds a share within 0 and 1: at 0 its gradient is inf, and clipping by norm makes it NaN."""
    torch.manual_seed(0)
    text = torch.arange(12).repeat(40)[:401]
    model = CharModel(counts=0.1 + 20 * torch.eye(12).roll(-1, 1))  # of a text that was read from right to left
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    state, losses = None, []
    for start in range(0, 400, 20):
        logits, state = model(text[None, start:start + 20], state)
        state = state.detach()
        loss = nn.functional.cross_entropy(logits[0], text[start + 1:start + 21])
        losses.append(loss.item())
        if losses[-1] != losses[-1]:
            break
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.share.clamp_(1e-4 if cured else 0, 1)
    return losses


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.policy, self.value = nn.Linear(4, 32), nn.Linear(32, 2), nn.Linear(32, 1)

    def forward(self, state):
        h = self.body(state).tanh()
        return torch.distributions.Categorical(logits=self.policy(h)), self.value(h).squeeze(-1)


@death(step=4, phase="loss", module="", operation="std", line="advantages.std()", verdict="spread of one",
       source="https://github.com/DLR-RM/stable-baselines3/issues/325")
def one_step_episode(cured):
    """An actor and a critic learn from one episode at a time, standardised, and the fourth ends at its first step."""
    torch.manual_seed(0)
    agent = ActorCritic()
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3)
    losses = []
    for length in (9, 6, 14, 1, 7, 11):
        chances, values, rewards = [], [], []
        state = torch.randn(4)
        for _ in range(length):
            policy, value = agent(state)
            action = policy.sample()
            chances.append(policy.log_prob(action))
            values.append(value)
            rewards.append(float(action == (state[0] > 0)))
            state = 0.9 * state + 0.3 * torch.randn(4)
        returns = torch.tensor(rewards).flip(0).cumsum(0).flip(0)
        values = torch.stack(values)
        advantages = returns - values.detach()
        if not cured or len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        loss = -(torch.stack(chances) * advantages).sum() + F.mse_loss(values, returns)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
    return losses
