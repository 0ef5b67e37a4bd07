"""The ops, one module each: contract, checks, fake, autograd function, functional."""
