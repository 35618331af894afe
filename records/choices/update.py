"""Milliseconds of an update of the weights, before and after the cut, in turn on one thread: python update.py OLD NEW

OLD and NEW are folders with the three scripts. Before the cut, Newton-Schulz takes filters with equally many rows as
one batch, padded with zeros. After it, each filter by itself.
"""
import statistics
import sys
import time

import torch

def load(path):
    names = {'__name__': 'script', '__file__': path}
    exec(compile(open(path, encoding='utf-8').read(), path, 'exec'), names)
    return names

torch.set_num_threads(1)
for script in ('mnist_fast', 'fashion_fast', 'cifar_fast'):
    old, new = (load(f'{folder}/{script}.py') for folder in sys.argv[1:])
    nets = old['Net'](10), new['Net'](10)
    for net in nets:
        for p in net.parameters():
            p.grad = torch.randn_like(p)
    groups = old['parameter_groups'](nets[0])
    optimizer = new['Optimizer'](nets[1], None)
    lr_scale = torch.tensor(0.5)
    times = {'before': [], 'after': []}
    for _ in range(11):
        start = time.perf_counter()
        old['update'](groups, lr_scale, torch.float32)
        middle = time.perf_counter()
        optimizer.step(lr_scale)
        times['before'].append(middle - start)
        times['after'].append(time.perf_counter() - middle)
    print(script, {name: round(1e3 * statistics.median(found[1:]), 2) for name, found in times.items()})
