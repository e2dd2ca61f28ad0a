"""Commands that ask and tell, a file each; `cli` knows them all. They print, and nothing else in the house does."""
