"""The learngene: blocks, their mixing over relative depth, the auxiliary model that trains them, and what is written from them."""
