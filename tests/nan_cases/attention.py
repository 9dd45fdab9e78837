"""Masks that die: attention in which a row may look at nothing, or a mask made by a product with infinity."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import death


class SentenceClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(40, 16, padding_idx=0)
        self.self_attn = nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True)
        self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, tokens):
        x = self.words(tokens)
        attended, _weights = self.self_attn(x, x, x, key_padding_mask=tokens == 0)
        return self.fc(F.relu(self.norm(x + attended)).mean(1))


@death(step=3, phase="forward", module="self_attn", operation="_softmax", line="self.self_attn(x, x, x, key_pad",
       verdict="empty softmax row", source="https://github.com/pytorch/pytorch/issues/40932")
def empty_sentence(cured):
    """Sentences in nn.MultiheadAttention: one of the third batch is empty, so all its keys are padding."""
    torch.manual_seed(0)
    model, criterion = SentenceClassifier(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for batch in range(8):
        tokens, labels = torch.randint(1, 40, (8, 12)), torch.randint(3, (8,))
        for sentence, length in zip(tokens, torch.randint(3, 13, (8,)).tolist(), strict=True):
            sentence[length:] = 0
        if batch == 2:
            tokens[5] = 0
        if cured:
            labels, tokens = labels[tokens.any(1)], tokens[tokens.any(1)]
        loss = criterion(model(tokens), labels)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


class CausalAttention(nn.Module):
    def __init__(self, width, minus_infinity):
        super().__init__()
        self.qkv, self.out, self.minus_infinity = nn.Linear(width, 3 * width), nn.Linear(width, width), minus_infinity

    def forward(self, x, padding):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future | padding[:, None], self.minus_infinity)
        return self.out(scores.softmax(-1) @ v)


class Block(nn.Module):
    def __init__(self, width, minus_infinity):
        super().__init__()
        self.attention, self.norm = CausalAttention(width, minus_infinity), nn.LayerNorm(width)

    def forward(self, x, padding):
        return x + self.attention(self.norm(x), padding)


class LanguageModel(nn.Module):
    def __init__(self, minus_infinity):
        super().__init__()
        self.tokens = nn.Embedding(30, 24)
        self.blocks = nn.ModuleList(Block(24, minus_infinity) for _ in range(2))
        self.head = nn.Linear(24, 30)

    def forward(self, ids, padding):
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x, padding)
        return self.head(x)


@death(step=4, phase="forward", module="blocks.0.attention", operation="_softmax", line="scores.softmax(-1) @ v",
       verdict="empty softmax row", source="https://github.com/huggingface/transformers/pull/25284")
def left_padding(cured):
    """A language model padded on the left: by the causal mask the first tokens may see only padding, so nothing."""
    torch.manual_seed(0)
    lm = LanguageModel(torch.finfo(torch.float32).min if cured else float("-inf"))
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3, weight_decay=0.1)

    def step(ids, padding):
        logits = lm(ids[:, :-1], padding[:, :-1])
        labels = ids[:, 1:].masked_fill(padding[:, 1:], -100)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses = []
    for i in range(10):
        ids, padding = torch.randint(1, 30, (6, 14)), torch.zeros(6, 14, dtype=torch.bool)
        if i == 3:
            padding[2, :5] = True
        losses.append(step(ids, padding))
        if math.isnan(losses[-1]):
            break
    return losses


class MapLayer(nn.TransformerEncoderLayer):
    """nn.TransformerEncoderLayer that keeps its attention for pictures."""
    def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
        x, self.attention_map = self.self_attn(x, x, x, attn_mask=attn_mask, need_weights=True)
        return self.dropout1(x)


class GraphTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.nodes = nn.Linear(7, 16)
        layer = MapLayer(16, nhead=2, dim_feedforward=32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.readout = nn.Linear(16, 1)

    def forward(self, x, bias, sizes):
        x = self.encoder(self.nodes(x), mask=bias.repeat_interleave(2, dim=0))
        return torch.stack([self.readout(graph[:n]).sum() for graph, n in zip(x, sizes, strict=True)])


@death(step=1, phase="forward", module="encoder.layers.0.self_attn", operation="_softmax",
       line="self.self_attn(x, x, x, attn_mask=attn_mask", verdict="empty softmax row",
       source="https://github.com/dmlc/dgl/issues/5476")
def padded_graphs(cured):
    """Graphs of different sizes, biased by distance and padded with -inf: a row of no node is nothing else."""
    torch.manual_seed(0)
    net = GraphTransformer()
    optimizer = torch.optim.RAdam(net.parameters(), lr=1e-3)
    history = []
    for _ in range(6):
        sizes = torch.randint(3, 9, (10,)).tolist()
        x, bias = torch.zeros(10, 8, 7), torch.full((10, 8, 8), -torch.inf)
        for i, n in enumerate(sizes):
            x[i, :n], bias[i, :n, :n] = torch.randn(n, 7), -torch.randint(5, (n, n)).float()
            if cured:
                bias[i, n:] = 0
        loss = F.smooth_l1_loss(net(x, bias, sizes), x.sum((1, 2)))
        history.append(loss.item())
        if math.isnan(history[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return history


class MaskedAttention(nn.Module):
    def __init__(self, width, far):
        super().__init__()
        self.query, self.key, self.far = nn.Linear(width, width), nn.Linear(width, width), far

    def forward(self, x, mask):
        scores = self.query(x) @ self.key(x).mT / x.shape[-1] ** 0.5
        if not mask.all():
            scores = scores + ((1.0 - mask) * self.far)[:, None]
        return torch.softmax(scores, dim=-1) @ x


class Questions(nn.Module):
    def __init__(self, far):
        super().__init__()
        self.embed, self.attention, self.kind = nn.Embedding(50, 12), MaskedAttention(12, far), nn.Linear(12, 4)

    def forward(self, ids, mask):
        return self.kind(self.attention(self.embed(ids), mask)[:, 0])


@death(step=3, phase="forward", module="attention", operation="mul", line="(1.0 - mask) * self.far",
       verdict="zero times infinity", source="https://github.com/cerebroai/reformers/issues/3")
def mask_times_infinity(cured):
    """An additive mask as (1 - mask) * -inf: of tokens that are there, 0 * -inf, as soon as a batch has padding."""
    torch.manual_seed(0)
    net = Questions(far=-1e9 if cured else -math.inf)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    losses = []
    for longest in (9, 9, 6, 9, 7, 9):
        ids, mask = torch.randint(50, (5, 9)), torch.ones(5, 9)
        mask[3, longest:] = 0
        loss = F.cross_entropy(net(ids, mask), ids[:, 0] % 4)
        losses.append(loss.item())
        if losses[-1] != losses[-1]:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(40, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classifier = nn.Linear(16, 5)

    def forward(self, input_ids, attention_mask, labels=None):
        hidden = self.encoder(self.embeddings(input_ids), src_key_padding_mask=attention_mask == 0)
        logits, loss = self.classifier(hidden), None
        if labels is not None:
            loss = F.cross_entropy(logits.view(-1, 5), labels.view(-1), ignore_index=-100)
        return {"loss": loss, "logits": logits}


@death(step=3, phase="forward", module="", operation="nll_loss_forward", line="F.cross_entropy(logits.view(-1, 5)",
       verdict="mean of nothing", source="https://github.com/pytorch/pytorch/issues/70348")
def all_labels_ignored(cured):
    """In the manner of Hugging Face, dict in and dict out with the loss: one batch has no label that counts."""
    torch.manual_seed(0)
    model = Tagger().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def collate(step):
        batch = {"input_ids": torch.randint(40, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.long),
                 "labels": torch.randint(5, (4, 9))}
        batch["attention_mask"][1, 6:], batch["labels"][1, 6:] = 0, -100
        if step == 3:
            batch["labels"][:, int(cured):] = -100  # cured: the prompt is cut so that an answer is left
        return batch

    losses = []
    for step in range(1, 9):
        output = model(**collate(step))
        losses.append(output["loss"].item())
        if not math.isfinite(losses[-1]):
            break
        output["loss"].backward()
        optimizer.step()
        model.zero_grad()
    return losses
