"""Functions that zero_completion lets a model complete: made for it, from easy to hard, not taken from a benchmark.

The model sees signature and docstring; the bodies here show that each doctest can be passed.
"""

# ruff: noqa: SIM110, C416, C419


def double(x):
    """Return twice x.

    >>> double(4)
    8
    >>> double(-1)
    -2
    """
    return 2 * x


def largest(a, b):
    """Return the larger one of two numbers.

    >>> largest(3, 7)
    7
    >>> largest(5, 2)
    5
    """
    return a if a > b else b


def is_even(number):
    """Return whether a number is even.

    >>> is_even(10)
    True
    >>> is_even(7)
    False
    """
    return number % 2 == 0


def average(values):
    """Return the mean of a list of numbers.

    >>> average([1, 2, 3, 6])
    3.0
    """
    return sum(values) / len(values)


def last_item(items):
    """Return the last item of a list, or None if it is empty.

    >>> last_item([1, 2, 3])
    3
    >>> last_item([])
    """
    return items[-1] if items else None


def greet(name):
    """Return a greeting for somebody.

    >>> greet("Anna")
    'Hello, Anna!'
    >>> greet("Leo")
    'Hello, Leo!'
    """
    return f"Hello, {name}!"


def reverse_text(text):
    """Return a text with its characters in reverse order.

    >>> reverse_text("abc")
    'cba'
    """
    return text[::-1]


def count_letter(text, letter):
    """Return how often a letter occurs in a text.

    >>> count_letter("banana", "a")
    3
    >>> count_letter("banana", "x")
    0
    """
    return text.count(letter)


def clamp(value, low, high):
    """Return a value, moved into the range from low to high.

    >>> clamp(5, 0, 10)
    5
    >>> clamp(-3, 0, 10)
    0
    >>> clamp(12, 0, 10)
    10
    """
    return max(low, min(value, high))


def area_of_rectangle(width, height):
    """Return the area of a rectangle.

    >>> area_of_rectangle(3, 4)
    12
    """
    return width * height


def to_celsius(fahrenheit):
    """Convert degrees Fahrenheit to degrees Celsius.

    >>> to_celsius(212)
    100.0
    >>> to_celsius(32)
    0.0
    """
    return (fahrenheit - 32) * 5 / 9


def sum_of_squares(numbers):
    """Return the sum of the squares of some numbers.

    >>> sum_of_squares([1, 2, 3])
    14
    >>> sum_of_squares([])
    0
    """
    return sum(number * number for number in numbers)


def only_positive(numbers):
    """Return the numbers of a list that are above zero, in order.

    >>> only_positive([3, -1, 0, 8])
    [3, 8]
    """
    return [number for number in numbers if number > 0]


def first_word(sentence):
    """Return the first word of a sentence.

    >>> first_word("the river is cold")
    'the'
    """
    return sentence.split()[0]


def join_with_dash(words):
    """Join some words by dashes.

    >>> join_with_dash(["red", "green", "blue"])
    'red-green-blue'
    """
    return "-".join(words)


def factorial(n):
    """Return the product of the numbers from 1 to n.

    >>> factorial(5)
    120
    >>> factorial(0)
    1
    """
    result = 1
    for factor in range(2, n + 1):
        result *= factor
    return result


def lengths(words):
    """Return the length of each word.

    >>> lengths(["a", "boat", ""])
    [1, 4, 0]
    """
    return [len(word) for word in words]


def unique(items):
    """Return the items of a list without repetitions, in the order of their first occurrence.

    >>> unique([3, 1, 3, 2, 1])
    [3, 1, 2]
    """
    return list(dict.fromkeys(items))


def longest_word(words):
    """Return the longest word of a list; the first one of several.

    >>> longest_word(["tree", "a", "river", "stone"])
    'river'
    """
    return max(words, key=len)


def is_palindrome(text):
    """Return whether a text reads the same in both directions.

    >>> is_palindrome("level")
    True
    >>> is_palindrome("river")
    False
    """
    return text == text[::-1]


def count_words(text):
    """Return how often each word occurs in a text, as a dictionary.

    >>> count_words("a b a")
    {'a': 2, 'b': 1}
    """
    words = text.split()
    return {word: words.count(word) for word in words}


def invert(mapping):
    """Return a dictionary with keys and values exchanged.

    >>> invert({"a": 1, "b": 2})
    {1: 'a', 2: 'b'}
    """
    return {value: key for key, value in mapping.items()}


def flatten(lists):
    """Return the items of some lists in one list.

    >>> flatten([[1, 2], [], [3]])
    [1, 2, 3]
    """
    return [item for one in lists for item in one]


def pairs(items):
    """Return each item with its successor.

    >>> pairs([1, 2, 3])
    [(1, 2), (2, 3)]
    """
    return list(zip(items, items[1:]))


def running_sums(numbers):
    """Return the sums of the first one, two, three ... numbers.

    >>> running_sums([2, 5, 1])
    [2, 7, 8]
    """
    total, sums = 0, []
    for number in numbers:
        total += number
        sums.append(total)
    return sums


def second_largest(numbers):
    """Return the second largest of some different numbers.

    >>> second_largest([4, 9, 2, 7])
    7
    """
    return sorted(numbers)[-2]


def is_prime(n):
    """Return whether a number is a prime.

    >>> [n for n in range(12) if is_prime(n)]
    [2, 3, 5, 7, 11]
    """
    return n > 1 and all(n % divisor for divisor in range(2, n))


def digits_of(number):
    """Return the decimal digits of a number that is not negative.

    >>> digits_of(4096)
    [4, 0, 9, 6]
    """
    return [int(digit) for digit in str(number)]


def fibonacci(count):
    """Return the first numbers of the Fibonacci sequence.

    >>> fibonacci(7)
    [0, 1, 1, 2, 3, 5, 8]
    """
    numbers = [0, 1]
    while len(numbers) < count:
        numbers.append(numbers[-1] + numbers[-2])
    return numbers[:count]


def chunks(items, size):
    """Cut a list into parts of a size; the last one may be shorter.

    >>> chunks([1, 2, 3, 4, 5], 2)
    [[1, 2], [3, 4], [5]]
    """
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


def transpose(rows):
    """Return the columns of a table that is given by its rows.

    >>> transpose([[1, 2, 3], [4, 5, 6]])
    [[1, 4], [2, 5], [3, 6]]
    """
    return [list(column) for column in zip(*rows)]


def greatest_common_divisor(a, b):
    """Return the greatest number that divides both a and b.

    >>> greatest_common_divisor(12, 18)
    6
    >>> greatest_common_divisor(7, 5)
    1
    """
    while b:
        a, b = b, a % b
    return a


def binary(number):
    """Return a number that is not negative, written in base 2.

    >>> binary(10)
    '1010'
    >>> binary(0)
    '0'
    """
    return f"{number:b}"


def merge_sorted(first, second):
    """Merge two sorted lists into one sorted list.

    >>> merge_sorted([1, 4, 6], [2, 3, 9])
    [1, 2, 3, 4, 6, 9]
    """
    return sorted(first + second)


def group_by_length(words):
    """Return a dictionary from length to the words of that length, in order.

    >>> group_by_length(["a", "to", "b"])
    {1: ['a', 'b'], 2: ['to']}
    """
    return {len(word): [other for other in words if len(other) == len(word)] for word in words}


def is_balanced(text):
    """Return whether each round bracket of a text has its partner.

    >>> is_balanced("(a (b) c)")
    True
    >>> is_balanced(")(")
    False
    >>> is_balanced("(()")
    False
    """
    depth = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            return False
    return depth == 0
