"""Opening originals, finding their blocks and linears, swapping modules."""
