"""PFLOP of a run on a CPU, from counted steps of 50 images: python pflop.py DATA SCRIPT [KEY=VALUE ...]. DATA holds
NAME.pt, SCRIPT is the path of fashion_fast.py or cifar_fast.py."""
import runpy
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

data_dir, path, *values = sys.argv[1:]
script = runpy.run_path(path, run_name='script')
names, hyp = script['build'].__globals__, script['hyp']
functions, states = [], []
names['capture'] = lambda function, *rest: functions.append(function) or function
make_state = names['make_state']
names['make_state'] = lambda *rest: states.append(make_state(*rest)) or states[0]
script['override']([f'data.dir={data_dir}', *values])
data = script['load_data'](torch.device('cpu'))
steps = sum(count for _, count in script['plan'](len(data['train']['labels'])))
batch_size, tests = hyp['opt']['batch_size'], len(data['test']['labels'])
hyp['opt']['batch_size'] = 50
data['test'] = {key: x[:100] for key, x in data['test'].items()}
script['build'](data, torch.device('cpu'), None)

def count(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()

flops = [count(function) for function in functions]
update = count(lambda: names['update'](states[0].groups, torch.tensor(0.0), torch.float32))
*each, test = flops  # the steps of each kind, equally many, and the evaluation
run = sum(steps / len(each) * ((step - update) * batch_size / 50 + update) for step in each) + test * tests / 100
print(script['SCRIPT'], *values, f'{run / 1e15:.4f} PFLOP')
