"""Thirty prompts of five kinds, of our own writing."""

PROMPTS = (
    # questions
    "Why is the sky blue?",
    "What is the difference between a frog and a toad?",
    "How do I keep bread fresh for longer?",
    "Who painted the ceiling of the Sistine Chapel?",
    "What should I look at when I buy a used bicycle?",
    "Explain what a prime number is to a child.",
    "Why do leaves turn red in autumn?",
    "What are three good reasons to learn to swim?",
    # arithmetic
    "What is 17 plus 25?",
    "A train travels 60 miles in 2 hours. How fast is it? Show your work.",
    "If I have 12 apples and give away 5, how many are left?",
    "Compute 9 * 8 step by step.",
    "List the first ten square numbers.",
    "A shirt costs 20 dollars and is reduced by 15 percent. What is the new price?",
    # code
    "Write a Python function that reverses a string.",
    "Write a Python function that returns the largest number of a list.",
    "How do I read a file line by line in Python?",
    "Write a loop that prints the numbers from 1 to 10.",
    "Write a function that checks whether a word is a palindrome.",
    "Show me a small class for a bank account.",
    # stories
    "Write a short story about a lost dog.",
    "Tell me a story about a lighthouse keeper.",
    "Write a poem about the rain.",
    "Describe a market in the early morning.",
    "Write a letter from a traveller to a friend.",
    "Tell a bedtime story about a small bear.",
    # copying
    "Repeat this sentence five times: The quick brown fox jumps over the lazy dog.",
    "Copy this text exactly, twice: one two three four five six seven eight nine ten.",
    "Write the alphabet, then write it again.",
    "Correct the spelling and repeat the text: I hav a dog. He is verry big. I hav a cat. She is verry small.",
)
