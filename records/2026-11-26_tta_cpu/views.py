"""Trains a network and keeps its logits of the held-out images, moved by up to REACH pixels and mirrored.

    DATA_DIR=data python views.py SCRIPT OUT SEED REACH run.holdout=10000 [key=value ...]
"""
import importlib.util
import sys

import torch
import torch.nn.functional as F

path, out, seed, reach, *arguments = sys.argv[1:]
reach = int(reach)
sys.argv = [path]
spec = importlib.util.spec_from_file_location('script', path)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
script.override(arguments)
device, dtype = script.pick_device()
data = script.load_data(device)
train, net, _ = script.build(data, device, dtype)
result, _ = train(int(seed))
net.eval()

images, labels = data['test']['images'], data['test']['labels']
height, width = images.shape[2:]
padded = F.pad(images.float(), (reach, reach, reach, reach), 'reflect')
autocast = torch.autocast(device.type, dtype, dtype is not None, cache_enabled=False)

@torch.no_grad()
def logits(view):
    with autocast:
        return torch.cat([net(part) for part in view.split(2500)]).float()

reflected, rolled = {}, {}
for down in range(-reach, reach + 1):
    for right in range(-reach, reach + 1):
        view = padded[:, :, reach - down:reach - down + height, reach - right:reach - right + width]
        other = images.roll((down, right), (2, 3))
        for flip in (0, 1):
            reflected[down, right, flip] = logits(view.flip(3) if flip else view)
            rolled[down, right, flip] = logits(other.flip(3) if flip else other)
torch.save({'reflected': reflected, 'rolled': rolled, 'labels': labels, 'result': result.tolist()}, out)
