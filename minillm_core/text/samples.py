"""Short texts of many kinds, on which tokenizers are compared.

The scripts are the beginning of the Universal Declaration of Human Rights, Article 1 (United Nations, public domain).
"""

SAMPLES = {
    "code": (
        "def permute(index: np.ndarray, n: int, key: tuple[int, ...]) -> np.ndarray:\n"
        '    """Applies a permutation of range(n)."""\n'
        "    half = max(1, ((n - 1).bit_length() + 1) // 2)\n"
        "    for i in range(6):\n"
        "        left, right = right, left ^ (mixed & low)\n"
        "    return values\n"
        "\n"
        "#include <stdio.h>\n"
        "int main(void) {\n"
        '\tfor (int i = 0; i < 10; ++i) printf("%d\\n", i * i);\n'
        "\treturn 0;\n"
        "}\n"
    ),
    "numbers": "3.14159265 1,000,000 2026-11-27 0x7fff 1e-12 (555) 010-9999 1/3 99.9% 17:05:59 192.168.0.1 $1,234.50\n",
    "emoji": "Great 😀👍🏽, family 👩\u200d👩\u200d👧, flag 🇫🇷, heart ❤\ufe0f\n",
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια.\n",
    "Russian": "Все люди рождаются свободными и равными в своем достоинстве и правах.\n",
    "Arabic": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.\n",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।\n",
    "Chinese": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心。\n",
    "Japanese": "すべての人間は、生まれながらにして自由であり、平等である。\n",
    "Korean": "모든 인간은 태어날 때부터 자유로우며 평등하다.\n",
}
"""Name -> text."""
