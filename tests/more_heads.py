"""More heads than the corpus has: patterns people write, each after another way in which a tracer can go wrong.

`STORABLE` come back as data, `CODE` must be refused. Each entry is the head's class, its arguments, and the form of its
input as in `heads_in_the_wild`.
"""

import math
import random
from collections import OrderedDict
from typing import Any

import numpy as np
import timm.layers
import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange, Reduce
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


class ArcMargin(nn.Module):
    """Labels that the tower never passes; the margin branch is never taken."""

    def __init__(self, dim, classes):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, dim) * 0.1)

    def forward(self, x, labels=None):
        cosine = F.linear(F.normalize(x), F.normalize(self.weight))
        if labels is None:
            return cosine * 30.0
        one_hot = torch.zeros_like(cosine).scatter_(1, labels.view(-1, 1), 1)
        return cosine - 0.5 * one_hot


class LearnedGeM(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.p = nn.Parameter(torch.ones(1) * 3)
        self.fc = nn.Linear(dim, 8)

    def forward(self, x):
        return self.fc(F.adaptive_avg_pool2d(x.clamp(min=1e-6).pow(self.p), 1).pow(1.0 / self.p).flatten(1))


class SqueezeExcite(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(dim, 8), nn.ReLU(inplace=True), nn.Linear(8, dim), nn.Sigmoid())

    def forward(self, x):
        b, c, _, _ = x.size()
        return (x * self.fc(self.pool(x).view(b, c)).view(b, c, 1, 1).expand_as(x)).mean([2, 3])


class PyramidPool(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim * 14, 5)

    def forward(self, x):
        return self.fc(torch.cat([F.adaptive_avg_pool2d(x, k).flatten(1) for k in (1, 2, 3)], 1))


class QueryAttention(nn.Module):
    def __init__(self, tokens, dim):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, dim))
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True, dropout=0.1)

    def forward(self, x):
        pooled, weights = self.attention(self.query.expand(x.shape[0], -1, -1), x, x)
        return pooled.squeeze(1), weights


class CausalEncoder(nn.Module):
    """A mask in a buffer that is not in the state dict."""

    def __init__(self, tokens, dim):
        super().__init__()
        layer = nn.TransformerEncoderLayer(dim, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.register_buffer("mask", torch.triu(torch.full((tokens, tokens), float("-inf")), 1), persistent=False)

    def forward(self, x):
        return self.encoder(x, mask=self.mask)[:, -1]


class QueryDecoder(nn.Module):
    def __init__(self, tokens, dim):
        super().__init__()
        layer = nn.TransformerDecoderLayer(dim, 4, 64, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2, norm=nn.LayerNorm(dim))
        self.queries = nn.Embedding(5, dim)

    def forward(self, x):
        queries = self.queries(torch.arange(5, device=x.device)).unsqueeze(0).repeat(x.size(0), 1, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(5).to(x.device)
        return self.decoder(queries, x, tgt_mask=mask).mean(1)


class DinoHead(nn.Module):
    """The old weight_norm: a hook that recomputes the weight, and a cached weight that deepcopy refuses to copy."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, 32), nn.GELU(), nn.Linear(32, 16))
        self.last_layer = nn.utils.weight_norm(nn.Linear(16, 20, bias=False))
        self.last_layer.weight_g.data.fill_(1)
        self.last_layer.weight_g.requires_grad = False

    def forward(self, x):
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, p=2))


class Parametrized(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Linear(dim, 9))
        self.orthogonal = parametrizations.orthogonal(nn.Linear(9, 4))

    def forward(self, x):
        return self.orthogonal(self.normed(x))


class OldSpectralNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc = nn.utils.spectral_norm(nn.Linear(dim, 8))

    def forward(self, x):
        return self.fc(x)


class Hooked(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.first = nn.Linear(dim, 9)
        self.first.register_forward_hook(lambda module, args, output: output * 2)
        self.second = nn.Sequential(nn.Linear(9, 3))
        self.second.register_forward_pre_hook(lambda module, args: (args[0].tanh(),))

    def forward(self, x):
        return self.second(self.first(x))


class LinearSubclass(nn.Linear):
    """Looks like a Linear, is none."""

    def forward(self, x):
        return super().forward(F.normalize(x))


class StandardizedConv(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        scale = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        return F.conv2d(x, weight / scale.expand_as(weight), self.bias, self.stride, self.padding).mean((2, 3))


class ChannelsFirstNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)
        return (self.weight[:, None, None] * x + self.bias[:, None, None]).mean([2, 3])


class NamedSequential(nn.Sequential):
    def __init__(self, dim):
        super().__init__(OrderedDict(fc=nn.Linear(dim, 8), act=nn.ReLU()))


class ManyOutputs(nn.Module):
    """Nested containers, None, a number and a label beside the tensors."""

    def __init__(self, dim):
        super().__init__()
        self.heads = nn.ModuleDict({"task-a": nn.Linear(dim, 2), "b": nn.Linear(dim, 3)})

    def forward(self, x):
        tasks = {name: head(x) for name, head in self.heads.items()}
        return {"tasks": tasks, "sums": [x.sum(1), (x.mean(1), None)], "count": 2, "kind": "pair"}


class ClipScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.ones([]) * np.log(1 / 0.07))
        self.proj = nn.Linear(dim, 8, bias=False)

    def forward(self, x):
        return F.normalize(self.proj(x), dim=-1) * self.logit_scale.exp().clamp(max=100)


class EinsumHeads(nn.Module):
    def __init__(self, tokens, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, dim, 8))

    def forward(self, x):
        return torch.einsum("bnc,hcd->bhnd", x, self.weight).amax(2).flatten(1)


class BilinearGate(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mix = nn.Bilinear(dim, dim, 16)
        self.same = nn.Identity()
        self.flat = nn.Flatten()

    def forward(self, x):
        value, gate = self.flat(self.same(self.mix(x, x))).chunk(2, dim=-1)
        return value * torch.sigmoid(gate)


class ChannelShuffle(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x):
        b, c, h, w = x.data.size()
        x = self.norm(x).view(b, 4, c // 4, h, w).transpose(1, 2).contiguous()
        return x.view(b, -1, h, w).mean((2, 3))


class GumbelCodes(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 8)

    def forward(self, x):
        return F.gumbel_softmax(self.fc(x), tau=0.7, hard=True)


class BetaMixup(nn.Module):
    """A permutation of the batch and a Beta variable, in training only."""

    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 8)

    def forward(self, x):
        if self.training:
            order = torch.randperm(x.size(0), device=x.device)
            share = torch.distributions.Beta(0.4, 0.4).sample((x.shape[0], 1)).to(x)
            x = share * x + (1 - share) * x[order]
        return self.fc(x)


class NormalSample(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 8)

    def forward(self, x):
        mean, spread = self.fc(x).chunk(2, -1)
        posterior = torch.distributions.Normal(mean, F.softplus(spread))
        return posterior.rsample(), torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))


class ShiftedQueue(nn.Module):
    """A memory that moves by the batch size in training."""

    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 8)
        self.register_buffer("queue", torch.randn(64, 8))

    def forward(self, x):
        z = F.normalize(self.fc(x))
        out = z @ self.queue.clone().detach().t()
        if self.training:
            self.queue = torch.cat([z.detach(), self.queue[: -len(z)]], 0)
        return out


class MovingCodebook(nn.Module):
    def __init__(self, dim, k=16):
        super().__init__()
        self.register_buffer("codes", torch.randn(k, dim))
        self.register_buffer("counts", torch.zeros(k))
        self.k = k

    def forward(self, x):
        index = torch.cdist(x, self.codes).argmin(1)
        one_hot = F.one_hot(index, self.k).type_as(x)
        quantized = one_hot @ self.codes
        if self.training:
            self.counts.data.mul_(0.9).add_(one_hot.sum(0), alpha=0.1)
            update = (one_hot.t() @ x.detach()) / (self.counts.unsqueeze(1) + 1e-5)
            self.codes.data.copy_(self.codes * 0.9 + update * 0.1)
        return x + (quantized - x).detach(), index


class MomentumTwin(nn.Module):
    """A second network that follows the first by assignments to `.data`."""

    def __init__(self, dim):
        super().__init__()
        self.online = nn.Sequential(nn.Linear(dim, 16), nn.BatchNorm1d(16))
        self.target = nn.Sequential(nn.Linear(dim, 16), nn.BatchNorm1d(16))
        self.target.requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            if self.training:
                for own, other in zip(self.online.parameters(), self.target.parameters(), strict=True):
                    other.data = other.data * 0.99 + own.data * 0.01
            target = self.target(x)
        return self.online(x), target


class RenormedPrototypes(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.prototypes = nn.Linear(dim, 6, bias=False)

    def forward(self, x):
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight.data.clone(), dim=1))
        return self.prototypes(F.normalize(x, dim=1))


class WarmUp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.register_buffer("step", torch.zeros(()))
        self.fc = nn.Linear(dim, 4)

    def forward(self, x):
        if self.training:
            self.step += 1
        return self.fc(x) * torch.clamp(self.step / 100, max=1.0)


class Checkpointed(nn.Module):
    def __init__(self, dim, reentrant):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(dim, 16), nn.Dropout(0.2), nn.ReLU())
        self.fc = nn.Linear(16, 3)
        self.reentrant = reentrant

    def forward(self, x):
        return self.fc(checkpoint(self.body, x, use_reentrant=self.reentrant))


class TiedAutoencoder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.encode = nn.Linear(dim, 16, bias=False)
        self.twin = nn.Linear(dim, 16, bias=False)
        self.twin.weight = self.encode.weight

    def forward(self, x):
        return F.linear(self.encode(x) * self.twin(x), self.encode.weight.t())


class FrozenNorm(nn.Module):
    """A BatchNorm that stays in evaluation whatever the mode."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)
        self.norm.requires_grad_(False)
        self.fc = nn.Linear(dim, 4)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x):
        return self.fc(self.norm(x))


class DropBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 4)

    def forward(self, x):
        if self.training:
            seeds = (torch.rand(x.shape[0], *x.shape[2:]) < 0.02).to(x.device, x.dtype)
            keep = 1 - F.max_pool2d(seeds[:, None], 3, 1, 1)
            x = x * keep * (keep.numel() / keep.sum())
        return self.fc(x.flatten(2).mean(-1))


class SinusPositions(nn.Module):
    """A table in a buffer that is not saved, and a constant in a plain attribute."""

    def __init__(self, tokens, dim):
        super().__init__()
        table = torch.zeros(tokens, dim)
        angle = torch.arange(tokens).unsqueeze(1) * torch.exp(torch.arange(0, dim, 2) * (-math.log(1e4) / dim))
        table[:, 0::2], table[:, 1::2] = torch.sin(angle), torch.cos(angle)
        self.register_buffer("table", table.unsqueeze(0), persistent=False)
        self.scale = torch.tensor(2.0)
        self.fc = nn.Linear(dim, 4)

    def forward(self, x):
        return self.fc((x * self.scale + self.table[:, : x.size(1)]).mean(1))


class BatchArithmetic(nn.Module):
    """Everything people compute from the batch size: halves, pairs, roots, reciprocals."""

    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 8)

    def forward(self, x):
        z = self.fc(x)
        n = z.shape[0]
        similar = (z @ z.T / n).masked_fill(torch.eye(n, dtype=torch.bool, device=z.device), -1e9)
        halves = torch.cat([torch.arange(n // 2 + 1), torch.arange(n - n // 2)])
        i, j = torch.triu_indices(n, n, 1)
        pairs = (z[i] - z[j]).pow(2).sum() / max(1, n * (n - 1) // 2)
        return similar.softmax(1).sum(1), z / math.sqrt(n), z * (1.0 / n), halves, pairs, z.reshape(2 * n, 4)


class ManyLayers(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.InstanceNorm2d(dim, affine=True, track_running_stats=True)
        self.group = nn.GroupNorm(4, dim)
        self.conv = nn.Conv2d(dim, 8, 3, padding="same", padding_mode="reflect")
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.act = nn.PReLU(8)
        self.deconv = nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x):
        return self.deconv(self.act(self.up(self.conv(self.group(self.norm(x)))))).mean((2, 3))


class Recurrent(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.rnn = nn.RNN(dim, 8, 2)
        self.lstm = nn.LSTM(8, 4, proj_size=3)

    def forward(self, x):
        y, _ = self.rnn(x[None], torch.zeros(2, x.size(0), 8))
        y, (hidden, cell) = self.lstm(y)
        return y[0], hidden, cell


class BorrowedLayer(nn.Module):
    """A layer run with other weights than its own."""

    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 4)

    def forward(self, x):
        return torch.func.functional_call(self.fc, {"weight": self.fc.weight * 2, "bias": self.fc.bias}, (x,))


class ChangedArgument(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(dim, 4)

    def forward(self, x):
        self.drop.p = 0.5
        return self.fc(self.drop(x))


class AutocastRegions(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 6)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            exact = self.fc(x.float())
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return exact, self.fc(x)


class SpectralFilter(nn.Module):
    def __init__(self, dim, height, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(height, width // 2 + 1, dim, 2) * 0.02)
        self.fc = nn.Linear(dim, 4)

    def forward(self, x):
        _, _, h, w = x.shape
        spectrum = torch.fft.rfft2(x.permute(0, 2, 3, 1), dim=(1, 2), norm="ortho")
        x = torch.fft.irfft2(spectrum * torch.view_as_complex(self.weight), s=(h, w), dim=(1, 2), norm="ortho")
        return self.fc(x.mean((1, 2)))


class CompactBilinear(nn.Module):
    """Random constants drawn once, in plain attributes."""

    def __init__(self, dim):
        super().__init__()
        self.buckets = torch.randint(0, 32, (dim,))
        self.signs = 2 * torch.randint(0, 2, (dim,)).float() - 1

    def forward(self, x):
        sketch = x.new_zeros(x.size(0), 32).index_add_(1, self.buckets.to(x.device), x * self.signs.to(x.device))
        return torch.sign(sketch) * torch.sqrt(sketch.abs() + 1e-10)


class SoftExperts(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(dim, 8) for _ in range(3)])
        self.gate = nn.Linear(dim, 3)

    def forward(self, x):
        choice = self.gate(x).argmax(-1)
        out = torch.zeros(x.size(0), 8)
        for k, expert in enumerate(self.experts):
            out[choice == k] = expert(x[choice == k])
        return out


class NumpyConstant(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 4)
        self.weights = np.array([1.0, 2, 3, 4], dtype=np.float32)

    def forward(self, x):
        return self.fc(x) * torch.from_numpy(self.weights).to(x.device) + torch.tensor(self.weights)


class EinopsLayers(nn.Module):
    def __init__(self, dim, height, width):
        super().__init__()
        self.net = nn.Sequential(Rearrange("b c h w -> b (h w) c"), nn.Linear(dim, 8), Reduce("b n d -> b d", "mean"))

    def forward(self, x):
        return self.net(x)


class TimmTokens(nn.Module):
    def __init__(self, tokens, dim):
        super().__init__()
        from timm.models.vision_transformer import Block

        self.block = Block(dim, 4, drop_path=0.1, init_values=1e-5, proj_drop=0.1)
        self.pool = timm.layers.AttentionPoolLatent(dim, num_heads=4)

    def forward(self, x):
        return self.pool(self.block(x))


class TimmMap(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv = timm.layers.ConvNormAct(dim, dim)
        self.gate = timm.layers.SqueezeExcite(dim)
        self.norm = timm.layers.LayerNorm2d(dim)
        self.head = timm.layers.ClassifierHead(dim, 7, drop_rate=0.1)

    def forward(self, x):
        return self.head(self.norm(self.gate(self.conv(x))))


class UnusedParts(nn.Module):
    """State that never matters, a function and a lambda in attributes, a layer that is never called."""

    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 4)
        self.spare = nn.Linear(dim, 2)
        self.calls = 0
        self.act, self.double = F.relu, lambda x: x * 2

    def forward(self, x):
        self.calls += 1
        self.last = self.double(self.act(self.fc(x)))
        return self.last


# --- code


class BackwardHook(nn.Module):
    """A gradient reversal that is no autograd function."""

    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 4)

    def forward(self, x):
        y = x.clone()
        y.register_hook(lambda gradient: -gradient)
        return self.fc(y)


class ModuleBackwardHook(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 4)
        self.fc.register_full_backward_hook(lambda module, given, received: (-given[0],))

    def forward(self, x):
        return self.fc(x)


class WeightHook(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 4)
        self.fc.weight.register_hook(lambda gradient: gradient * 0.1)

    def forward(self, x):
        return self.fc(x)


class PatchedForward(nn.Module):
    """A closure that keeps using the first instance's weight, whatever is copied."""

    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 4)
        self.fc.forward = lambda x: F.linear(x, self.fc.weight) * 3

    def forward(self, x):
        return self.fc(x)


class PointerQueue(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 8)
        self.register_buffer("queue", torch.randn(8, 64))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def forward(self, x):
        z = self.fc(x)
        out = z @ self.queue.clone().detach()
        if self.training:
            start = int(self.pointer)
            self.queue[:, start : start + len(z)] = z.detach().T
            self.pointer[0] = (start + len(z)) % 64
        return out


class DataInit(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.register_buffer("ready", torch.tensor(False))
        self.shift = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        if not self.ready:
            self.shift.data.copy_(-x.mean(0))
            self.ready.fill_(True)
        return x + self.shift


class PythonCounter(nn.Module):
    """Each training step does something else, by a Python number."""

    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 4)
        self.step = 0

    def forward(self, x):
        if self.training:
            self.step += 1
        return self.fc(x) * min(1.0, self.step / 10 + 0.1)


class LatePythonCounter(nn.Module):
    """The first two steps do not tell."""

    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 4)
        self.step = 0

    def forward(self, x):
        if self.training:
            self.step += 1
        return self.fc(x) * (1.0 if self.step < 500 else 0.5)


class PythonRandom(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 4)

    def forward(self, x):
        return self.fc(x) * (0.0 if self.training and random.random() < 0.5 else 1.0)


class OtherPathForOne(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        x = self.fc(x)
        return self.norm(x) if x.shape[0] > 1 else x


class LoopOverBatch(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 4)

    def forward(self, x):
        return torch.stack([self.fc(row) for row in x])


class SwallowedRefusal(nn.Module):
    """A `try` of the user's own around what cannot be data."""

    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 4)

    def forward(self, x):
        try:
            scale = float(x.abs().max())
        except ValueError:
            scale = 1.0
        return self.fc(x) / scale


class ExtraState(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 4)

    def get_extra_state(self) -> Any:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        pass

    def forward(self, x):
        return self.fc(x)


class HugeConstant(nn.Module):
    """More in a plain attribute than a config file should hold."""

    def __init__(self, dim):
        super().__init__()
        self.table = torch.randn(dim, 40_000)

    def forward(self, x):
        return x @ self.table


class Uncopyable(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 4)
        self.log = (line for line in ())

    def forward(self, x):
        return self.fc(x)


STORABLE: list[tuple[Any, tuple[Any, ...], str]] = [
    (ArcMargin, (96, 7), "vector"),
    (LearnedGeM, (96,), "map"),
    (SqueezeExcite, (96,), "map"),
    (PyramidPool, (96,), "map"),
    (QueryAttention, (101, 64), "tokens"),
    (CausalEncoder, (101, 64), "tokens"),
    (QueryDecoder, (101, 64), "tokens"),
    (DinoHead, (96,), "vector"),
    (Parametrized, (96,), "vector"),
    (OldSpectralNorm, (96,), "vector"),
    (Hooked, (96,), "vector"),
    (LinearSubclass, (96, 5), "vector"),
    (StandardizedConv, (96, 8, 1), "map"),
    (ChannelsFirstNorm, (96,), "map"),
    (NamedSequential, (96,), "vector"),
    (ManyOutputs, (96,), "vector"),
    (ClipScale, (96,), "vector"),
    (EinsumHeads, (101, 64), "tokens"),
    (BilinearGate, (96,), "vector"),
    (ChannelShuffle, (96,), "map"),
    (GumbelCodes, (96,), "vector"),
    (BetaMixup, (96,), "vector"),
    (NormalSample, (96,), "vector"),
    (ShiftedQueue, (96,), "vector"),
    (MovingCodebook, (96,), "vector"),
    (MomentumTwin, (96,), "vector"),
    (RenormedPrototypes, (96,), "vector"),
    (WarmUp, (96,), "vector"),
    (Checkpointed, (96, True), "vector"),
    (TiedAutoencoder, (96,), "vector"),
    (FrozenNorm, (96,), "vector"),
    (DropBlock, (96,), "map"),
    (SinusPositions, (101, 64), "tokens"),
    (BatchArithmetic, (96,), "vector"),
    (ManyLayers, (96,), "map"),
    (Recurrent, (96,), "vector"),
    (BorrowedLayer, (96,), "vector"),
    (ChangedArgument, (96,), "vector"),
    (AutocastRegions, (96,), "vector"),
    (SpectralFilter, (96, 5, 5), "map"),
    (CompactBilinear, (96,), "vector"),
    (SoftExperts, (96,), "vector"),
    (NumpyConstant, (96,), "vector"),
    (EinopsLayers, (96, 5, 5), "map"),
    (TimmTokens, (101, 64), "tokens"),
    (TimmMap, (96,), "map"),
    (UnusedParts, (96,), "vector"),
    (nn.Linear, (96, 5), "vector"),
    (nn.Identity, (), "vector"),
]

CODE: list[tuple[Any, tuple[Any, ...], str]] = [
    (BackwardHook, (96,), "vector"),
    (ModuleBackwardHook, (96,), "vector"),
    (WeightHook, (96,), "vector"),
    (PatchedForward, (96,), "vector"),
    (PointerQueue, (96,), "vector"),
    (DataInit, (96,), "vector"),
    (PythonCounter, (96,), "vector"),
    (LatePythonCounter, (96,), "vector"),
    (PythonRandom, (96,), "vector"),
    (OtherPathForOne, (96,), "vector"),
    (LoopOverBatch, (96,), "vector"),
    (SwallowedRefusal, (96,), "vector"),
    (ExtraState, (96,), "vector"),
    (HugeConstant, (96,), "vector"),
    (Uncopyable, (96,), "vector"),
]

# In older torch this kind of checkpointing is an autograd function with state in Python: refused there, as code is.
(CODE if hasattr(torch.utils.checkpoint, "_NoopSaveInputs") else STORABLE).append((Checkpointed, (96, False), "vector"))
