"""Gradients of S networks of mnist_fast.py stacked with torch.func, against one network after another:
python stacked.py THREADS, beside mnist_fast.py."""
import runpy, sys, time
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, stack_module_state, vmap

torch.set_num_threads(int(sys.argv[1]))
make_net = runpy.run_path('mnist_fast.py')['make_net']
images, labels = torch.rand(192, 1, 20, 20) * 255, torch.randint(10, (192,))

def plain_net():
    net = make_net(10)
    for module in net.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False  # vmap cannot write in place
    return net

def seconds(function, times):
    for _ in range(3):
        function()
    started = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - started) / times

for seeds in (1, 4, 16, 64):
    nets, skeleton = [plain_net() for _ in range(seeds)], plain_net().to('meta')
    parameters, buffers = stack_module_state(nets)
    x, y = images.expand(seeds, -1, -1, -1, -1).contiguous(), labels.expand(seeds, -1).contiguous()

    def loss(parameters, buffers, x, y):
        return F.cross_entropy(functional_call(skeleton, (parameters, buffers), (x,)), y)

    stacked = vmap(grad(loss))
    nets = [net.to(memory_format=torch.channels_last) for net in nets]

    def one_after_another():
        for net, batch, label in zip(nets, x, y):
            net.zero_grad()
            F.cross_entropy(net(batch), label).backward()

    times = max(3, 60 // seeds)
    together = seconds(lambda: stacked(parameters, buffers, x, y), times) / seeds * 1000
    apart = seconds(one_after_another, times) / seeds * 1000
    print(f'{sys.argv[1]} threads, {seeds:2d} seeds: stacked {together:.2f} ms for a step of a seed, '
          f'one after another {apart:.2f} ms, ratio {apart / together:.2f}')
