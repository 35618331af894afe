"""PFLOP of a run, from counted steps: python pflop.py SCRIPT [KEY=VALUE ...]

SCRIPT is the path of one of the three scripts. mnist_fast.py is counted whole. In the others, the arithmetic of a step
is linear in the batch size: counts for 50 and for 100 images give that of any batch, and of the update of the weights.
Steps of different kinds are equally many."""
import runpy
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

path, *values = sys.argv[1:]
script = runpy.run_path(path, run_name='script')
hyp = script['hyp']
script['override'](values)
data = script['load_data'](torch.device('cpu'))
images, tests = len(data['train']['labels']), len(data['test']['labels'])

def count(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()

def count_parts(batch_size):
    """FLOP of each function that build() captures: the steps, and last the test of 100 images."""
    hyp['opt']['batch_size'] = batch_size
    functions = []
    script['build'].__globals__['capture'] = lambda function, device: functions.append(function) or function
    script['build'](data, torch.device('cpu'), None)
    return [count(function) for function in functions]

if script['SCRIPT'] == 'mnist_fast':
    train, net = script['build'](data, torch.device('cpu'), None)
    run = count(lambda: train(0))
else:
    batch_size = hyp['opt']['batch_size']
    steps = round(hyp['opt']['epochs'] * images / batch_size)
    data['test'] = {key: x[:100] for key, x in data['test'].items()}
    *small, test = count_parts(50)
    *large, test = count_parts(100)
    each = [a + (b - a) * (batch_size - 50) / 50 for a, b in zip(small, large)]
    run = steps * sum(each) / len(each) + test * tests / 100
print(script['SCRIPT'], *values, f'{run / 1e15:.7f} PFLOP')
