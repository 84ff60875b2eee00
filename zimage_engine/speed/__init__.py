"""What makes drawing quicker at the price of other last bits: what there is, acts, and is remembered."""
