"""Expert MLPs made of torch operations, on any device. What needs another library has a folder beside this one."""
