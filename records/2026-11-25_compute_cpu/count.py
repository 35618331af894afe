"""PFLOP of runs of cifar_fast.py: python count.py, beside the script, with CIFAR10.pt in data.

A run is counted on a fiftieth of the training and test images, times fifty. Steps see full batches either way, so only the
number of steps counts."""
import runpy

import torch
from torch.utils.flop_counter import FlopCounterMode

for arguments in (['opt.epochs=2'], ['opt.epochs=4'], [], ['opt.epochs=16', 'aug.shift=4']):
    script = runpy.run_path('cifar_fast.py', run_name='script')
    script['override'](arguments)
    cpu = torch.device('cpu')
    data = script['load_data'](cpu)
    for part in ('train', 'test'):
        images, labels = data[part]['images'], data[part]['labels']
        data[part] = {'images': images[:len(images) // 50], 'labels': labels[:len(labels) // 50]}
    train, *_ = script['build'](data, cpu, torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        train(0)
    print(round(50 * counter.get_total_flops() / 1e15, 4), 'PFLOP', ' '.join(arguments) or 'the defaults', flush=True)
