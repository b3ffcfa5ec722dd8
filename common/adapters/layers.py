"""Linear layers as they come: plain, quantised, or under an adapter."""


def base(module):
    """The linear layer itself, under an adapter or not."""
    return getattr(module, "base", module)


def linears(module):
    """The linear layers within `module`, each with its adapter if it has one."""
    adapted = [m for m in module.modules() if hasattr(m, "base") and hasattr(m, "factors")]
    inside = {id(m.base) for m in adapted}
    plain = [m for m in module.modules() if hasattr(m, "in_features") and id(m) not in inside
             and not hasattr(m, "factors")]
    return adapted + plain


def matrix(module):
    """The weight of a linear layer as a parameter, None if it is quantised."""
    return base(module)._parameters.get("weight")


def keeps_input(module):
    """Whether a linear layer needs its input again: for the gradient of its weight, or of A."""
    weight = matrix(module)
    if weight is not None and weight.requires_grad:
        return True
    return base(module) is not module and not module.dropout and module.factors()[0].requires_grad
