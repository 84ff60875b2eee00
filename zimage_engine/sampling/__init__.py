"""From a request to pictures: the plan, and the stock pipeline that draws it."""
