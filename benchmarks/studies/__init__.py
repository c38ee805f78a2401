"""What the method does: experiments that are no comparison of `scalora compare`, and their figures."""
