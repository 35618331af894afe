"""train_mnist_fast's stage 8: its network, optimizer, schedule and batch size as published, data preloaded; its clock
from the network's birth to the test accuracy. main(layout) -> accuracy, seconds."""
import time
import torch, torch.nn as nn, torch.nn.functional as F
from torch.optim.lr_scheduler import OneCycleLR

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 24, 5, 1), nn.Conv2d(24, 32, 3, 1)
        self.fc1, self.fc2 = nn.Linear(800, 256), nn.Linear(256, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return F.log_softmax(self.fc2(F.relu(self.fc1(torch.flatten(x, 1)))), dim=1)

def make(train_data, train_labels, test_data, test_labels, layout=torch.contiguous_format):
    def main(seed):
        torch.manual_seed(seed)
        start = time.perf_counter()
        net = Net().to(memory_format=layout)
        steps = (len(train_data) - 1) // 256 + 1
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, betas=(0.7, 0.9))
        scheduler = OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps, cycle_momentum=False)
        net.train()
        for i in range(steps):
            optimizer.zero_grad()
            loss = F.nll_loss(net(train_data[256 * i:256 * (i + 1)]), train_labels[256 * i:256 * (i + 1)])
            loss.backward()
            optimizer.step()
            scheduler.step()
        net.eval()
        correct, test_loss = 0, 0
        with torch.no_grad():
            for i in range(len(test_data) // 2000):
                output, target = net(test_data[2000 * i:2000 * (i + 1)]), test_labels[2000 * i:2000 * (i + 1)]
                test_loss += F.nll_loss(output, target, reduction='sum').item()
                correct += (output.argmax(1) == target).sum().item()
        return {'seed': seed, 'acc': correct / len(test_labels), 'time_s': round(time.perf_counter() - start, 4), 'steps': steps}
    return main
