"""Seconds of a training step with conv3x3 and with F.conv2d in its place, in turn in one process, on the CPU in
bfloat16: python steps.py DATA SCRIPT. DATA holds NAME.pt, SCRIPT is the path of fashion_fast.py or cifar_fast.py."""
import runpy
import statistics
import sys
import time

import torch

data_dir, path = sys.argv[1:]
script = runpy.run_path(path, run_name='script')
names = script['build'].__globals__
functions = []
names['capture'] = lambda function, *rest: functions.append(function) or function
script['override']([f'data.dir={data_dir}'])
data = script['load_data'](torch.device('cpu'))
script['build'](data, torch.device('cpu'), torch.bfloat16)
kinds = {'conv3x3': script['conv3x3'],
         'conv2d': lambda x, weight: torch.nn.functional.conv2d(x, weight, padding=1)}

print('torch', torch.__version__, torch.get_num_threads(), 'threads')
for number, step in enumerate(functions[:-1]):
    times = {kind: [] for kind in kinds}
    for _ in range(12):
        for kind, function in kinds.items():
            names['conv3x3'] = function
            started = time.perf_counter()
            step()
            times[kind].append(time.perf_counter() - started)
    medians = {kind: statistics.median(taken[2:]) for kind, taken in times.items()}
    print(script['SCRIPT'], 'step', number, {kind: round(median, 4) for kind, median in medians.items()},
          f'ratio {medians["conv3x3"] / medians["conv2d"]:.3f}')
