"""Small networks as people write them, for the comparison with what they are ported to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class PreActivation(nn.Module):
    def __init__(self, inside: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride != 1 or inside != out:
            self.shortcut = nn.Conv2d(inside, out, 1, stride, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = F.relu(self.bn2(self.conv1(out)))
        out = F.dropout(out, p=0.3, training=self.training)
        return torch.add(self.conv2(out), shortcut)


class WideResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.layers = nn.ModuleList([PreActivation(8, 16), PreActivation(16, 16)])
        self.layers.append(PreActivation(16, 24, 2))
        self.bn = nn.BatchNorm2d(24)
        self.fc = nn.Linear(24, 5)

    def forward(self, x):
        x = self.conv1(x)
        for layer in self.layers:
            x = layer(x)
        x = F.avg_pool2d(F.relu(self.bn(x)), 8)
        return self.fc(x.view(-1, 24))


class SqueezeByView(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(channels, 4, bias=False), nn.ReLU(inplace=True))
        self.fc.append(nn.Linear(4, channels, bias=False))

    def forward(self, x):
        b, c, _, _ = x.size()
        y = torch.sigmoid(self.fc(self.pool(x).view(b, c))).view(b, c, 1, 1)
        return x * y.expand_as(x)


class SqueezeOfPixels(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x):
        n, c, h, w = x.shape
        y = torch.tanh(self.fc(x.view(n, c, h * w).mean(2)))
        y = y.reshape(n, c, 1, 1).expand(n, c, h, w)
        return x * y * F.hardsigmoid(x.mean((2, 3)))[:, :, None, None]


class ChannelConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        y = F.adaptive_avg_pool2d(x, 1)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * torch.sigmoid(y)


class Squeezes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([SqueezeByView(8), SqueezeOfPixels(8), ChannelConvolution()])
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean([2, 3]))


class Cbam(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8))
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        size = (x.size(2), x.size(3))
        weights = self.mlp(F.avg_pool2d(x, size)) + self.mlp(F.max_pool2d(x, size, stride=size))
        x = x * torch.sigmoid(weights).unsqueeze(2).unsqueeze(3).expand_as(x)
        largest = torch.max(x, 1)[0].unsqueeze(1)
        x = x * torch.sigmoid(self.conv(torch.cat((largest, x.mean(1, keepdim=True)), dim=1)))
        return self.fc(x.amax((2, 3)))


class Shake(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16))
        self.right = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16))
        self.even, self.odd = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.conv(x)
        mixed = 0.3 * self.left(x) + (1 - 0.3) * self.right(x)
        even = self.even(F.avg_pool2d(F.relu(x), 1, 2))
        odd = self.odd(F.avg_pool2d(F.pad(F.relu(x), (-1, 1, -1, 1)), 1, 2))
        return self.fc(F.adaptive_max_pool2d(mixed + torch.cat((even, odd), 1), 1).flatten(1))


class LoopsOverShapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, 3, 2, 1)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv(x)
        while x.shape[-1] > 4:
            x = F.relu(self.norm(self.down(x)))
        if x.shape[2] != 1:
            x = F.adaptive_avg_pool2d(x, 1)
        return self.fc(torch.flatten(x, 1))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
        self.third = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 16, 2, 2)
        self.mix = nn.Conv2d(32, 8, 3, padding=1)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        first = self.first(x)
        second = self.second(first)
        up = self.up(self.third(second))
        height = second.size(2) - up.size(2)
        width = second.size(3) - up.size(3)
        up = F.pad(up, [width // 2, width - width // 2, height // 2, height - height // 2])
        mixed = self.mix(torch.cat([second, up], dim=1))
        mixed = F.interpolate(mixed, size=first.shape[2:], mode="bilinear", align_corners=True)
        return F.log_softmax(self.out(torch.cat((mixed, first), 1)), dim=1)


class DenseLayer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, 4, 3, padding=1, bias=False)

    def forward(self, features):
        joined = torch.cat(features, 1) if isinstance(features, list) else features
        return self.conv(F.relu(self.norm(joined)))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.layers = nn.ModuleList([DenseLayer(8), DenseLayer(12), DenseLayer(16)])
        self.fc = nn.Linear(20, 5)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        return self.fc(torch.cat(features, dim=1).mean((2, 3)))


class Dictionaries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        convs = {"a": nn.Conv2d(3, 8, 1), "b-1": nn.Conv2d(3, 8, 3, padding=1)}
        self.branches = nn.ModuleDict(convs)
        self.gates = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(2)])
        self.heads = nn.ModuleDict({"label": nn.Linear(8, 5), "box": nn.Linear(8, 4)})
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        branches = [self.branches["a"](x), self.branches["b-1"](x)]
        mixed = sum(torch.sigmoid(g) * y for g, y in zip(self.gates, branches, strict=True))
        pooled = mixed.mean((2, 3))
        return {name: head(pooled) for name, head in self.heads.items()}


class ChannelNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ScaledBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.wide = nn.Linear(channels, 2 * channels)
        self.narrow = nn.Linear(2 * channels, channels)
        self.response = nn.Parameter(torch.zeros(1, 1, 1, 2 * channels))
        self.gamma = nn.Parameter(0.01 * torch.ones(channels))

    def forward(self, x):
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        y = F.gelu(self.wide(y))
        energy = torch.norm(y, p=2, dim=(1, 2), keepdim=True) + torch.linalg.norm(
            y, dim=-1, keepdim=True
        )
        y = self.response * (y * energy / (energy.mean(-1, keepdim=True) + 1e-6)) + y
        return x + (self.gamma * self.narrow(y)).permute(0, 3, 1, 2)


class Unshifted(nn.GroupNorm):
    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels)
        self.bias = None


class ChannelNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.norm = ChannelNorm(8)
        self.blocks = nn.Sequential(ScaledBlock(8), ScaledBlock(8))
        self.last = Unshifted(2, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.last(self.blocks(self.norm(self.stem(x)))).std(dim=(2, 3)))


class OwnTensors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.25, 0.3]))
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.gain = nn.Parameter(torch.ones(1, 8, 1, 1))
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.weights = nn.Parameter(torch.ones(2))
        self.power = nn.Parameter(torch.ones(1) * 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = (x - self.mean) / self.std[None, :, None, None]
        weights = F.softplus(self.weights)
        weights = weights / (weights.sum() + 1e-4)
        x = weights[0] * self.left(x) + weights[1] * self.right(x)
        x = x * self.gain + self.alpha * x
        x = x.clamp(min=1e-6).pow(self.power.abs() + 1).mean((2, 3))
        return self.fc(x) / x.size(0)


class StandardisedByStd(nn.Conv2d):
    def forward(self, x):
        weight = self.weight
        mean = weight.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(3, keepdim=True)
        weight = weight - mean
        std = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        weight = weight / std.expand_as(weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)


class StandardisedWithGain(nn.Conv2d):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x):
        var, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True)
        weight = (self.weight - mean) / torch.sqrt(var + 1e-5) * self.gain
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)


class WeightStandardised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = StandardisedByStd(3, 8, 3, padding=1)
        self.second = StandardisedWithGain(8, 16, 3, 2, 1, groups=2, bias=False)
        self.norm = nn.GroupNorm(4, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.second(F.relu(self.first(x)))))
        return self.fc(F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0])


class BlurPools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 2.0, 1.0])
        kernel = taps[:, None] * taps[None, :] / 16
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.pad = nn.ReflectionPad2d(1)
        self.register_buffer("kernel", kernel[None, None].repeat(8, 1, 1, 1))
        self.register_buffer("constant", kernel[None, None], persistent=False)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.conv(x))
        x = F.conv2d(self.pad(x), self.kernel, stride=2, groups=x.shape[1])
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        x = F.conv2d(x, self.constant.repeat(8, 1, 1, 1), stride=2, groups=8)
        return self.fc(x.mean((2, 3)))


class Shuffles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 16, 1, groups=4)
        self.down = nn.Conv2d(4, 6, 3, 2, 1)
        self.fc = nn.Linear(6 * 8 * 8, 5)

    def forward(self, x):
        n, c, h, w = x.size()
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).contiguous()
        x = self.conv(x.view(n, c * 4, h // 2, w // 2))
        x = x.view(n, 4, 4, h // 2, w // 2).transpose(1, 2).contiguous().view(n, -1, h // 2, w // 2)
        left, right = x.chunk(2, 1)
        x = F.pixel_shuffle(torch.cat((F.relu(right), left.flip(3)), 1), 2)
        x = F.silu(self.down(x))
        return self.fc(x.view(x.size(0), -1))


class TwoImages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.mask = nn.Conv2d(1, 8, 3, 2, 1)

    def forward(self, image, mask):
        features = self.encoder(image) * torch.sigmoid(self.mask(mask))
        pooled = F.max_pool2d(features, kernel_size=features.size()[2:]).squeeze(3).squeeze(2)
        return F.normalize(pooled, dim=1), [features, pooled.sum(-1)]


class Signals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 8, 5, 2, 2)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Conv1d(8, 8, 3, padding=2, dilation=2)
        self.pool = nn.MaxPool1d(2)
        self.fc = nn.Linear(40, 5)

    def forward(self, x):
        x = self.pool(F.relu(self.norm(self.first(x))))
        return self.fc((F.elu(self.second(x)) + x).flatten(1))


class PixelAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 4, 1)
        self.query, self.key = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.qkv = nn.Linear(8, 24)
        self.position = nn.Parameter(torch.zeros(1, 16, 8))
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.mix = nn.Parameter(torch.zeros(8, 5))

    def forward(self, x):
        x = self.conv(x)
        b, c, h, w = x.size()
        query = self.query(x).view(b, -1, h * w).permute(0, 2, 1)
        weights = F.softmax(torch.bmm(query, self.key(x).view(b, -1, h * w)), dim=-1)
        x = torch.bmm(x.view(b, c, h * w), weights.permute(0, 2, 1)).view(b, c, h, w)
        x = x.flatten(2).transpose(1, 2) + self.position
        x = torch.cat((self.token.expand(b, -1, -1), x), 1)
        qkv = self.qkv(x).reshape(b, 17, 3, 2, 4).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        x = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(b, 17, 8)
        return torch.einsum("nlc,cd->nd", x, self.mix)


class Choices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.limit = nn.Parameter(torch.zeros(1, 8, 1, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv(x)
        x = torch.where(x > 0, x, 0.2 * x)
        mask = (x > self.limit).to(x.dtype)
        x = x * mask + x.clamp(min=-0.1) * (1 - mask)
        x = torch.maximum(F.relu(x), F.relu(x - 0.3))  # equal where both are zero
        x = x + torch.min(x, torch.zeros_like(x)) + x.clamp(0, 1)
        x = x.masked_fill(x.abs() < 0.1, 0.0)
        return self.fc(torch.max(x.flatten(2), dim=2).values + x.amin((2, 3)))


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(PreActivation(8, 8), PreActivation(8, 12, 2))
        self.position = nn.Parameter(torch.zeros(1, 1, 1, 1))
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.layer1(F.relu(self.bn1(self.conv1(x)))) + self.position
        return self.fc(x.mean((2, 3)))


class PartsOfBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resnet = Backbone()
        self.resnet.fc = nn.Identity()
        self.register_buffer("noise", torch.randn(1, 1, 16, 12))
        self.strength = nn.Parameter(torch.zeros(1, 8, 1, 1))

    def forward(self, x):
        x = self.resnet.bn1(self.resnet.conv1(x)) + self.strength * self.noise
        return self.resnet.layer1(x) - self.resnet.position


class SharedParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = PreActivation(8, 8)
        act = nn.PReLU()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 1), act, nn.Conv2d(8, 8, 1), act)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8)])
        self.norm = self.norms[0]
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)
        self.right.weight = self.left.weight

    def forward(self, x):
        x = self.stem(x)
        for _ in range(3):
            x = self.block(x)
        x = self.norm(self.body(self.norms[0](x)))
        return self.right(F.relu(self.left(x.mean((2, 3)))))


class Ties(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x):
        x = self.conv(x)
        first = torch.max(torch.stack((x, x.detach()), 1), 1)[0]
        divided = torch.stack((x, x.detach()), 1).amin(1)
        half = torch.maximum(x.detach(), 2 * x - x.detach())
        return (first + 3 * divided + 5 * half).mean((2, 3))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        identity = self.conv(x)
        x = self.norm(identity * 2)
        x += identity
        x = self.relu(self.norm(x)) * 0.5
        x.add_(1.0)
        return self.fc(x.mul_(2).div_(3).mean((2, 3)))


class Windows(nn.Module):
    """Unfolds, folds and compares windows; pools and norms as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.patches = nn.Unfold((4, 2), stride=(4, 2))
        self.fc = nn.Linear(64, 5)
        self.alike = nn.CosineSimilarity(dim=1)

    def forward(self, x):
        x = self.conv(x)
        x = x + F.fold(F.unfold(x, 3, 2, 2).tanh(), x.shape[-2:], 3, 2, 2)
        x = F.local_response_norm(x, 3, 0.1) * self.alike(x, x.mean((2, 3), keepdim=True))[:, None]
        pooled = F.lp_pool2d(x.abs() + 0.1, 3.0, (2, 1))
        return self.fc(self.patches(pooled).transpose(1, 2)).mean(1)


class Transformers(nn.Module):
    """A spatial transformer, and attention of torch.nn between the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 4, 1)
        self.places = nn.Linear(8, 6)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv(x)
        theta = self.places(x.mean((2, 3))).view(-1, 2, 3)
        with torch.autocast("cpu", enabled=False):
            grid = F.affine_grid(theta, [x.size(0), x.size(1), 4, 3], align_corners=False)
        x = F.grid_sample(x, grid, padding_mode="border", align_corners=True)
        x = x.flatten(2).transpose(1, 2)
        return self.fc(self.attention(x, x, x)[0].mean(1))


def flat() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(8 * 4 * 4, 5),
    )


IMAGE = ((3, 16, 16),)


class ResNet9(nn.Module):
    """The fast network of CIFAR: pooling between the convolutions, two residual parts, and logits
    that are scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.prep, self.layer1 = self.unit(3, 8), self.unit(8, 12, nn.MaxPool2d(2))
        self.res1 = nn.Sequential(self.unit(12, 12), self.unit(12, 12))
        self.layer2 = self.unit(12, 16, nn.MaxPool2d(2))
        self.res2 = nn.Sequential(self.unit(16, 16), self.unit(16, 16))
        self.head = nn.Sequential(nn.MaxPool2d(4), nn.Flatten(), nn.Dropout(0.2))
        self.linear = nn.Linear(16, 5, bias=False)

    @staticmethod
    def unit(inside: int, out: int, *more: nn.Module) -> nn.Sequential:
        conv = nn.Conv2d(inside, out, 3, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True), *more)

    def forward(self, x):
        x = self.layer1(self.prep(x))
        x = self.layer2(x + self.res1(x))
        return self.linear(self.head(x + self.res2(x))) * 0.125


NETWORKS = {
    "resnet9": (ResNet9, IMAGE),
    "wide_resnet": (WideResNet, IMAGE),
    "squeezes": (Squeezes, IMAGE),
    "cbam": (Cbam, IMAGE),
    "shake": (Shake, IMAGE),
    "loops_over_shapes": (LoopsOverShapes, IMAGE),
    "unet": (UNet, ((3, 18, 14),)),
    "dense": (Dense, IMAGE),
    "dictionaries": (Dictionaries, IMAGE),
    "channel_norms": (ChannelNorms, IMAGE),
    "own_tensors": (OwnTensors, IMAGE),
    "weight_standardised": (WeightStandardised, IMAGE),
    "blur_pools": (BlurPools, IMAGE),
    "shuffles": (Shuffles, IMAGE),
    "two_images": (TwoImages, ((3, 16, 16), (1, 16, 16))),
    "signals": (Signals, ((3, 20),)),
    "pixel_attention": (PixelAttention, IMAGE),
    "choices": (Choices, IMAGE),
    "parts_of_backbone": (PartsOfBackbone, ((3, 16, 12),)),
    "shared_parts": (SharedParts, IMAGE),
    "ties": (Ties, IMAGE),
    "in_place": (InPlace, IMAGE),
    "windows": (Windows, IMAGE),
    "transformers": (Transformers, IMAGE),
    "flat_sequential": (flat, IMAGE),
}
"""Name -> what builds the network, and the shapes of its inputs without the batch."""
