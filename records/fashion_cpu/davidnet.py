"""The one-strategy recipe of David Page's network (DavidNet) on Fashion-MNIST: 25 epochs of batches of 512, pad 4, crop,
mirror, cutout 8 x 8, SGD with Nesterov momentum under OneCycle, float32, channels_last, the data as one tensor.

    python davidnet.py STEPS    trains that many of its 2925 steps, prints the median step, times 117 an epoch, times 25 a run
"""
import ctypes, json, sys, time
import torch
import torch.nn.functional as F
from torch import nn

ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # as fashion_fast.py keeps its memory

def conv(inputs, outputs, *pool):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs),
                         nn.ReLU(inplace=True), *pool)

class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(conv(channels, channels), conv(channels, channels))
    def forward(self, x):
        return x + self.body(x)

torch.manual_seed(0)
net = nn.Sequential(conv(1, 64), conv(64, 128, nn.MaxPool2d(2)), Residual(128), conv(128, 256, nn.MaxPool2d(2)),
                    conv(256, 512, nn.MaxPool2d(2)), Residual(512), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
                    nn.Linear(512, 10, bias=False)).to(memory_format=torch.channels_last)
data = torch.load('data/FashionMNIST.pt', weights_only=True)
images, labels = data['train']['images'].float(), data['train']['labels']
mean, std = images.mean(), images.std()
padded = F.pad((images - mean) / std, (4, 4, 4, 4))
epochs, batch_size, steps = 25, 512, int(sys.argv[1])
per_epoch = len(images) // batch_size
optimizer = torch.optim.SGD(net.parameters(), lr=0.4, momentum=0.9, nesterov=True, weight_decay=5e-4)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=epochs * per_epoch, pct_start=0.2)

def batch(index):
    n = len(index)
    y, x = torch.randint(9, (2, n, 1)) + torch.arange(28)
    x = torch.where(torch.rand(n, 1) < 0.5, x.flip(1), x)
    crops = padded[index[:, None, None], 0, y[:, :, None], x[:, None, :]]
    corners = torch.randint(21, (2, n, 1))
    rows, columns = (torch.arange(28) >= corners) & (torch.arange(28) < corners + 8)
    return crops.masked_fill_(rows[:, :, None] & columns[:, None, :], 0)[:, None]

order, times = torch.randperm(len(images)), []
for step in range(steps):
    started = time.perf_counter()
    index = order[step % per_epoch * batch_size:][:batch_size]
    loss = F.cross_entropy(net(batch(index).contiguous(memory_format=torch.channels_last)) * 0.125, labels[index])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step(), scheduler.step()
    times.append(time.perf_counter() - started)
step_s = sorted(times[2:])[len(times[2:]) // 2]
print(json.dumps({'program': 'davidnet', 'steps': steps, 'loss': round(loss.item(), 3), 'step_s': round(step_s, 3), 'epoch_s': round(step_s * per_epoch, 1),
                  'run_s': round(step_s * per_epoch * epochs)}))
