"""Models and data to be examined."""

from itertools import pairwise

import torch
from torch import nn

from headwater.core.examples import DatasetExamples, TensorExamples


class Sentences(DatasetExamples):
    """Token sequences, padded on the right."""

    def __init__(self, sequences, labels=None):
        super().__init__(sequences, collate=self.pad, lengths=[len(s) for s in sequences])
        self.labels = sequences if labels is None else labels
        self.dataset = list(zip(sequences, self.labels, strict=True))

    @staticmethod
    def pad(pairs):
        def side(which, value):
            rows = [pair[which] for pair in pairs]
            return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        ids = side(0, 0)
        ones = [torch.ones_like(pair[0]) for pair in pairs]
        mask = nn.utils.rnn.pad_sequence(ones, batch_first=True)
        return {"input_ids": ids, "attention_mask": mask, "labels": side(1, -100)}


def sentences(n=6, first=(1,)):
    return [
        torch.cat([torch.tensor(first), torch.randint(2, 30, (4 + i,))]).long() for i in range(n)
    ]


def images(n=12):
    return TensorExamples(torch.randn(n, 6).double(), torch.randint(3, (n,)))


def mlp(*sizes):
    layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
    return nn.Sequential(*[x for layer in layers for x in (layer, nn.Tanh())][:-1]).double()


class Attention(nn.Module):
    """One layer of attention over embedded tokens; it looks at the mask only when it is told to."""

    def __init__(self, masked=True, vocab=30, dim=8):
        super().__init__()
        self.embed, self.mix = nn.Embedding(vocab, dim), nn.Linear(dim, dim)
        self.head, self.masked = nn.Linear(dim, vocab), masked
        self.double()

    def forward(self, input_ids, attention_mask):
        h = self.embed(input_ids)
        weights = h @ h.mT
        if self.masked:
            weights = weights.masked_fill(~attention_mask[:, None].bool(), -1e9)
        return self.head(torch.tanh(self.mix(weights.softmax(-1) @ h)))


class Forward(nn.Module):
    """A model whose forward pass is a function of itself."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = forward
        self.double()

    def forward(self, x):
        return self.run(self, x)


def failed(diagnosis):
    return [check.name for check in diagnosis.checks if check.status == "fail"]
