"""Other programs, as published: python peers.py stage8|airbench PATH RUNS LOG

PATH is stage8.py of ../2026-11-25_mnist_fast_cpu, or airbench94_muon.py. A line of JSON for each run. time_s is by the
program's own clock; wall_s is the whole of its main(), in airbench94_muon with an evaluation after each epoch. DATA_DIR has
to be set.
"""
import json
import os
import sys
import time
import torch

def note(row):
    about = {'program': program, 'torch': torch.__version__, 'card': torch.cuda.get_device_name(0)}
    with open(log, 'a') as file:
        file.write(json.dumps(about | row) + '\n')

def timed(function, *arguments):
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = function(*arguments)
    torch.cuda.synchronize()
    return result, round(time.perf_counter() - start, 4)

def airbench():
    data = torch.load(f'{os.environ["DATA_DIR"]}/CIFAR10.pt')
    os.makedirs('cifar10', exist_ok=True)
    for part in ('train', 'test'):
        images = data[part]['images'].permute(0, 2, 3, 1).contiguous()
        torch.save({'images': images, 'labels': data[part]['labels'], 'classes': data['classes']}, f'cifar10/{part}.pt')
    sys.argv = [path]
    names = {'__name__': 'peer', '__file__': path}
    exec(compile(open(path).read(), path, 'exec'), names)

    seen = {}
    names['print_training_details'] = lambda variables, is_final_entry: seen.update(variables)
    net = names['CifarNet']().cuda().to(memory_format=torch.channels_last)
    net.compile(mode='max-autotune')
    _, warm_up_s = timed(names['main'], 'warmup', net)
    for run in range(runs):
        torch.manual_seed(1000 + run)
        _, wall_s = timed(names['main'], run, net)
        note({'run': run, 'acc': seen['tta_val_acc'], 'acc_plain': seen['val_acc'],
              'time_s': round(seen['time_seconds'], 4), 'wall_s': wall_s, 'warm_up_s': round(warm_up_s, 1)})

def stage8():
    data = torch.load(f'{os.environ["DATA_DIR"]}/MNIST.pt')
    tensors = []
    for part in ('train', 'test'):
        tensors.append(((data[part]['images'].float() / 255 - 0.1307) / 0.3081).cuda())
        tensors.append(data[part]['labels'].cuda())
    names = {'__name__': 'peer'}
    exec(compile(open(path).read(), path, 'exec'), names)

    class Net(names['Net']):
        def to(self, memory_format):
            return super().to('cuda')

    names['Net'] = Net
    main = names['make'](*tensors)
    for run in range(runs):
        row, wall_s = timed(main, 1000 + run)
        note({'run': run, 'acc': row['acc'], 'time_s': row['time_s'], 'wall_s': wall_s})

program, path, runs, log = sys.argv[1:]
path, log, runs = os.path.abspath(path), os.path.abspath(log), int(runs)
{'airbench': airbench, 'stage8': stage8}[program]()
