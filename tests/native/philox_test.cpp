// philox_test.cpp - the published answers of the generator, and its bits as signs.

#include "kernels/philox.h"

#include "check.h"

namespace dcmerge {
namespace {

// counter, key, random words: the known answers that Random123 publishes for philox4x32-10.
void known_answers() {
    const struct {
        PhiloxBlock counter;
        uint64_t key;
        PhiloxBlock expected;
    } answers[] = {
        {{{0, 0, 0, 0}}, 0, {{0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8}}},
        {{{0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF}},
         0xFFFFFFFFFFFFFFFF,
         {{0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD}}},
        {{{0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344}},
         0x299F31D0A4093822,
         {{0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1}}},
    };
    for (const auto& answer : answers) {
        const PhiloxBlock found = philox(answer.counter, answer.key);
        for (int w = 0; w < 4; ++w) CHECK(found.word[w] == answer.expected.word[w]);
    }
}

template <typename Float>
void check_signs(int64_t length, int threads) {
    const uint64_t key = 0x0123456789ABCDEF;
    std::vector<Float> expected;
    for (int64_t e = 0; e < length; ++e) {
        const PhiloxBlock block = philox({{static_cast<uint32_t>(e / 128), 0, 0xFFFFFFFF, 3}}, key);
        expected.push_back((block.word[e % 128 / 32] >> (e % 32) & 1) != 0 ? Float(-1) : Float(1));
    }
    std::vector<Float> found = unwritten<Float>(length);
    cpu::rademacher<Float>({found.data(), length, key, 0xFFFFFFFF, 3}, threads);
    CHECK(same_bits(found, expected));
}

template <typename Float>
void test_signs_of() {
    for (const int threads : {1, 2, 7})
        for (const int64_t length : {0, 1, 31, 32, 127, 128, 129, 16'384, 16'385, 40'001})
            check_signs<Float>(length, threads);
}

template <typename Float>
void check_drops(int64_t length, int64_t offset, uint64_t dropped_below, int threads) {
    const uint64_t key = 0x0123456789ABCDEF;
    std::vector<Float> values, expected;
    for (int64_t i = 0; i < length; ++i) {
        const int64_t e = offset + i;
        const uint64_t block = static_cast<uint64_t>(e / 4);
        const PhiloxBlock bits =
            philox({{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 5, 0x80000000}}, key);
        values.push_back(Float(i % 7) - Float(3));
        expected.push_back(values.back() * (bits.word[e % 4] < dropped_below ? Float(0) : Float(1.25)));
    }
    std::vector<Float> found = unwritten<Float>(length);
    cpu::drop<Float>({values.data(), found.data(), length, offset, dropped_below, Float(1.25), key, 5, 0x80000000},
                     threads);
    CHECK(same_bits(found, expected));
}

template <typename Float>
void test_drops_of() {
    for (const int threads : {1, 2, 7})
        for (const int64_t length : {0, 1, 3, 4, 255, 256, 257, 16'384, 16'389, 40'001})
            for (const int64_t offset : {int64_t{0}, int64_t{1}, int64_t{258}, (int64_t{1} << 34) - 5})
                check_drops<Float>(length, offset, uint64_t{1} << 30, threads);
    for (const uint64_t dropped_below : {uint64_t{0}, uint64_t{0xFFFFFFFF}, uint64_t{1} << 32})
        check_drops<Float>(1'000, 0, dropped_below, 1);
}

}  // namespace

void test_philox() {
    known_answers();
    test_signs_of<float>();
    test_signs_of<double>();
    test_drops_of<float>();
    test_drops_of<double>();
    std::vector<float> out(1);
    CHECK_THROWS(cpu::drop<float>({out.data(), out.data(), 1, -1, 0, 1, 0, 0, 0}, 1), std::invalid_argument);
    CHECK_THROWS(cpu::drop<float>({out.data(), out.data(), 1, 0, (uint64_t{1} << 32) + 1, 1, 0, 0, 0}, 1),
                 std::invalid_argument);
    CHECK_THROWS(cpu::rademacher<float>({out.data(), 1, 0, 0, 0}, 0), std::invalid_argument);
}

}  // namespace dcmerge
