// See repvgg_engine.h. The sections of this file, each upon those before it:
//
//     status and text               Refused, which is what is thrown in here; guarded(), which makes a Status of it
//     SHA-256 and UTF-8             of bytes in memory
//     files                         read once, as a whole; written whole, or not at all
//     JSON                          any file of it
//     typed JSON                    a value with its place in the file
//     the sidecar                   what <engine>.json says, as strictly as Python reads it
//     the header of an engine file  what its first bytes say
//     calls of TensorRT and CUDA    errors, ownership, the current device
//     the runtime cache             the kernels that TensorRT for RTX compiles
//     the loaded engine             all checks, then deserialization; makes and frees contexts, one at a time
//     the context                   memory, streams, batches in parts, CUDA graphs
//     the interface                 of repvgg_engine.h
#include "repvgg_engine.h"

#include <NvInfer.h>
#include <cuda_runtime_api.h>
#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <initializer_list>
#include <limits>
#include <locale>
#include <map>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace repvgg {

// ---------------------------------------------------------------------------------------------------- status and text

Status::Status(Code code, const char* message) noexcept : code_(code) {
    if (message == nullptr) return;
    std::size_t length = 0;
    for (const char* letter = message; *letter != '\0' && length + 1 < sizeof(message_); ++letter) {
        const auto byte = static_cast<unsigned char>(*letter);
        message_[length++] = byte < 0x20 || byte == 0x7f ? ' ' : *letter;  // one line, whatever a path holds
    }
    message_[length] = '\0';
}

int Status::exit_code() const noexcept {
    switch (code_) {
        case Code::kHostMemory:
            return static_cast<int>(Code::kFile);
        case Code::kDeviceMemory:
        case Code::kInternal:
            return static_cast<int>(Code::kDevice);
        case Code::kOutput:
            return 5;
        default:
            return static_cast<int>(code_);
    }
}

namespace {

struct Refused {
    Status status;
};

[[noreturn]] void refuse(Code code, const std::string& message) { throw Refused{Status(code, message.c_str())}; }

// Runs `body`; whatever it throws becomes a status.
template <typename Body>
Status guarded(const Body& body) noexcept {
    try {
        body();
        return Status();
    } catch (const Refused& refused) {
        return refused.status;
    } catch (const std::bad_alloc&) {
        return Status(Code::kHostMemory, "out of memory on this machine; free memory and try again");
    } catch (const std::length_error&) {
        return Status(Code::kHostMemory, "out of memory on this machine: more was asked for than can be addressed");
    } catch (const std::exception& error) {
        return Status(Code::kInternal, error.what());
    } catch (...) {
        return Status(Code::kInternal, "something unknown was thrown; report this as a defect");
    }
}

std::string joined(const std::vector<std::string>& parts, const char* separator) {
    std::string text;
    for (const std::string& part : parts) text += (text.empty() ? "" : separator) + part;
    return text;
}

std::string text_of_cards(const std::vector<int>& cards) {
    std::vector<std::string> names;
    for (const int card : cards) names.push_back("sm" + std::to_string(card));
    return cards.empty() ? "unknown" : joined(names, ", ");
}

std::string text_of_size(int height, int width) { return std::to_string(height) + "x" + std::to_string(width); }

bool is_named(const char* path) { return path != nullptr && path[0] != '\0'; }

// ------------------------------------------------------------------------------------------------- SHA-256 and UTF-8

constexpr std::array<std::uint32_t, 64> kRoundConstants = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

using HashState = std::array<std::uint32_t, 8>;
constexpr std::size_t kHashBlock = 64;

std::uint32_t rotated(std::uint32_t word, unsigned bits) { return (word >> bits) | (word << (32 - bits)); }

// Section 6.2.2 for one block of 64 bytes.
void hash_block(HashState& state, const unsigned char* block) {
    std::array<std::uint32_t, 64> schedule{};
    for (std::size_t t = 0; t < 16; ++t) {
        const unsigned char* bytes = block + 4 * t;
        schedule[t] =
            std::uint32_t{bytes[0]} << 24 | std::uint32_t{bytes[1]} << 16 | std::uint32_t{bytes[2]} << 8 | bytes[3];
    }
    for (std::size_t t = 16; t < 64; ++t) {
        const std::uint32_t w2 = schedule[t - 2], w15 = schedule[t - 15];
        schedule[t] = (rotated(w2, 17) ^ rotated(w2, 19) ^ w2 >> 10) + schedule[t - 7] +
                      (rotated(w15, 7) ^ rotated(w15, 18) ^ w15 >> 3) + schedule[t - 16];
    }
    auto [a, b, c, d, e, f, g, h] = state;
    for (std::size_t t = 0; t < 64; ++t) {
        const std::uint32_t first = h + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + ((e & f) ^ (~e & g)) +
                                    kRoundConstants[t] + schedule[t];
        const std::uint32_t second = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + first, d = c, c = b, b = a, a = first + second;
    }
    const HashState worked = {a, b, c, d, e, f, g, h};
    for (std::size_t i = 0; i < state.size(); ++i) state[i] += worked[i];
}

std::string hexadecimal(const std::array<std::uint8_t, 32>& digest) {
    std::string text;
    for (const std::uint8_t byte : digest) {
        text += "0123456789abcdef"[byte >> 4];
        text += "0123456789abcdef"[byte & 15];
    }
    return text;
}

}  // namespace

std::array<std::uint8_t, 32> sha256(const void* data, std::size_t size) noexcept {
    HashState state = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    const auto* bytes = static_cast<const unsigned char*>(data);
    const std::size_t whole = size / kHashBlock * kHashBlock;
    for (std::size_t start = 0; start < whole; start += kHashBlock) hash_block(state, bytes + start);

    // The rest, a one, zeros, and the length in bits as 64 of them, big-endian.
    std::array<unsigned char, 2 * kHashBlock> last{};
    const std::size_t rest = size - whole;
    if (rest > 0) std::memcpy(last.data(), bytes + whole, rest);
    last[rest] = 0x80;
    const std::size_t padded = rest < kHashBlock - 8 ? kHashBlock : 2 * kHashBlock;
    const std::uint64_t bits = std::uint64_t{size} * 8;
    for (unsigned i = 0; i < 8; ++i) last[padded - 1 - i] = static_cast<unsigned char>(bits >> 8 * i & 0xff);
    for (std::size_t start = 0; start < padded; start += kHashBlock) hash_block(state, last.data() + start);

    std::array<std::uint8_t, 32> digest{};
    for (unsigned i = 0; i < digest.size(); ++i) {
        digest[i] = static_cast<std::uint8_t>(state[i / 4] >> (24 - 8 * (i % 4)) & 0xff);
    }
    return digest;
}

// Shortest forms alone, no surrogates, nothing past U+10FFFF.
std::size_t utf8_length(const void* data, std::size_t size) noexcept {
    constexpr std::array<std::uint32_t, 4> kLeast = {0, 0x80, 0x800, 0x10000};
    const auto* bytes = static_cast<const unsigned char*>(data);
    std::size_t position = 0;
    while (position < size) {
        const unsigned char lead = bytes[position];
        const std::size_t more = lead < 0x80 ? 0 : lead >> 5 == 6 ? 1 : lead >> 4 == 14 ? 2 : lead >> 3 == 30 ? 3 : 9;
        if (more == 9 || more > size - position - 1) return position;
        std::uint32_t point = more == 0 ? lead : lead & (0x3fu >> more);
        for (std::size_t i = 1; i <= more; ++i) {
            const unsigned char next = bytes[position + i];
            if (next >> 6 != 2) return position;
            point = point << 6 | (next & 0x3fu);
        }
        if (point < kLeast[more] || point > 0x10ffff || (point >= 0xd800 && point < 0xe000)) return position;
        position += more + 1;
    }
    return position;
}

namespace {

// ------------------------------------------------------------------------------------------------------------- files

std::vector<unsigned char> bytes_of_file(const std::string& path, std::uintmax_t limit) {
    std::error_code error;
    const std::uintmax_t size = std::filesystem::file_size(path, error);
    if (error) refuse(Code::kFile, path + ": cannot be read (" + error.message() + "); check the path");
    if (size > limit) refuse(Code::kFile, path + ": " + std::to_string(size) + " bytes are too many for such a file");
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (!file) refuse(Code::kFile, path + ": cannot be read (" + std::strerror(errno) + "); check the path");
    std::vector<unsigned char> content(static_cast<std::size_t>(size));
    const std::size_t read = content.empty() ? 0 : std::fread(content.data(), 1, content.size(), file.get());
    if (read != content.size() || std::fgetc(file.get()) != EOF) {
        refuse(Code::kFile, path + ": changed its size while it was read; try again");
    }
    return content;
}

// A file that has no name yet: nobody reads it before it is whole, and it is gone again unless it gets to that.
class UnfinishedFile {
  public:
    explicit UnfinishedFile(const std::string& path) : path_(path) {
        const std::filesystem::path whole(path);
        const std::string prefix = (whole.parent_path() / ("." + whole.filename().string() + ".partial-")).string();
        std::error_code error;
        const std::filesystem::file_status found = std::filesystem::status(whole, error);
        if (std::filesystem::exists(found) && !std::filesystem::is_regular_file(found)) wrong("it is no plain file");
        // Of a name that nobody has: neither another process, nor one that was killed while it wrote.
        for (int number = 0; file_ == nullptr; ++number) {
            partial_ = prefix + std::to_string(number);
            file_ = std::fopen(partial_.c_str(), "wbx");
            if (file_ == nullptr && (errno != EEXIST || number == kMostUnfinished)) wrong(std::strerror(errno));
        }
    }
    UnfinishedFile(const UnfinishedFile&) = delete;
    UnfinishedFile& operator=(const UnfinishedFile&) = delete;
    ~UnfinishedFile() {
        if (file_ != nullptr) static_cast<void>(std::fclose(file_));
        if (!named_) static_cast<void>(std::remove(partial_.c_str()));
    }

    void add(const void* data, std::size_t size) {
        if (std::fwrite(data, 1, size, file_) != size) wrong(std::strerror(errno));
    }

    // On the disk first, then under its name.
    void finish() {
        if (std::fflush(file_) != 0) wrong(std::strerror(errno));
#if __has_include(<unistd.h>)
        if (fsync(fileno(file_)) != 0) wrong(std::strerror(errno));
#endif
        if (std::fclose(std::exchange(file_, nullptr)) != 0) wrong(std::strerror(errno));
        std::error_code error;
        std::filesystem::rename(partial_, path_, error);
        if (error) wrong(error.message());
        named_ = true;
    }

  private:
    [[noreturn]] void wrong(const std::string& reason) const {
        refuse(Code::kOutput,
               path_ + ": cannot be written (" + reason + "); give a file in a writable directory with space left");
    }

    static constexpr int kMostUnfinished = 999;

    std::string path_, partial_;
    std::FILE* file_ = nullptr;
    bool named_ = false;
};

// -------------------------------------------------------------------------------------------------------------- JSON

// Any value, but not which of true and false; a number is kept as it is written. An object has a name for each of its
// entries.
struct Json {
    enum class Kind { kNull, kBoolean, kNumber, kText, kList, kObject };
    Kind kind = Kind::kNull;
    std::string text;
    std::vector<std::string> names;
    std::vector<Json> entries;
};

// What is wrong inside of a JSON file; whoever knows the file adds its name.
struct Malformed {
    std::string problem;
};

constexpr int kDeepest = 64;

// RFC 8259, UTF-8 alone, and stricter: no name twice in an object, no half of a character, nothing nested deeper than
// kDeepest.
class JsonReader {
  public:
    explicit JsonReader(const std::vector<unsigned char>& content) : content_(content) {}

    Json whole() {
        position_ = utf8_length(content_.data(), content_.size());
        if (position_ != content_.size()) wrong("not UTF-8");
        position_ = 0;
        Json value = read(0);
        skip_blanks();
        if (position_ != content_.size()) wrong("something stands behind the end");
        return value;
    }

  private:
    [[noreturn]] void wrong(const char* problem) const {
        throw Malformed{std::string("not JSON (") + problem + " at byte " + std::to_string(position_) + ")"};
    }

    // The next byte, or -1 at the end.
    int peek() const { return position_ < content_.size() ? content_[position_] : -1; }

    bool accept(char letter) {
        if (peek() != static_cast<unsigned char>(letter)) return false;
        ++position_;
        return true;
    }

    void expect(const char* letters) {
        for (; *letters != '\0'; ++letters) {
            if (!accept(*letters)) wrong("no value");
        }
    }

    void skip_blanks() {
        while (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r') ++position_;
    }

    bool at_digit() const { return peek() >= '0' && peek() <= '9'; }

    Json read(int depth);
    Json read_list(int depth);
    Json read_object(int depth);
    Json read_number();
    std::string read_text();
    std::uint32_t read_escaped();
    std::uint32_t read_hexadecimal();

    const std::vector<unsigned char>& content_;
    std::size_t position_ = 0;
};

void append_utf8(std::string& text, std::uint32_t point) {
    const auto append = [&text](std::uint32_t byte) { text += static_cast<char>(static_cast<unsigned char>(byte)); };
    if (point < 0x80) {
        append(point);
    } else if (point < 0x800) {
        append(0xc0 | point >> 6), append(0x80 | (point & 0x3f));
    } else if (point < 0x10000) {
        append(0xe0 | point >> 12), append(0x80 | (point >> 6 & 0x3f)), append(0x80 | (point & 0x3f));
    } else {
        append(0xf0 | point >> 18), append(0x80 | (point >> 12 & 0x3f));
        append(0x80 | (point >> 6 & 0x3f)), append(0x80 | (point & 0x3f));
    }
}

Json JsonReader::read(int depth) {
    if (depth > kDeepest) wrong("nested too deeply");
    skip_blanks();
    Json value;
    switch (peek()) {
        case '{':
            return read_object(depth);
        case '[':
            return read_list(depth);
        case '"':
            value.kind = Json::Kind::kText;
            value.text = read_text();
            return value;
        case 't':
        case 'f':
            value.kind = Json::Kind::kBoolean;
            expect(peek() == 't' ? "true" : "false");
            return value;
        case 'n':
            expect("null");
            return value;
        default:
            return read_number();
    }
}

Json JsonReader::read_list(int depth) {
    Json value;
    value.kind = Json::Kind::kList;
    expect("[");
    skip_blanks();
    if (accept(']')) return value;
    do {
        value.entries.push_back(read(depth + 1));
        skip_blanks();
    } while (accept(','));
    if (!accept(']')) wrong("a list without its end");
    return value;
}

Json JsonReader::read_object(int depth) {
    Json value;
    value.kind = Json::Kind::kObject;
    expect("{");
    skip_blanks();
    if (accept('}')) return value;
    do {
        skip_blanks();
        if (peek() != '"') wrong("no name");
        value.names.push_back(read_text());
        skip_blanks();
        if (!accept(':')) wrong("no colon");
        value.entries.push_back(read(depth + 1));
        skip_blanks();
    } while (accept(','));
    if (!accept('}')) wrong("an object without its end");
    std::vector<std::string> sorted = value.names;
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    if (twice != sorted.end()) throw Malformed{"\"" + *twice + "\" stands there twice"};
    return value;
}

Json JsonReader::read_number() {
    const std::size_t start = position_;
    const auto digits = [this] {
        if (!at_digit()) wrong("no value");
        while (at_digit()) ++position_;
    };
    accept('-');
    if (!accept('0')) digits();
    if (accept('.')) digits();
    if (accept('e') || accept('E')) {
        if (!accept('+')) accept('-');
        digits();
    }
    Json value;
    value.kind = Json::Kind::kNumber;
    for (std::size_t i = start; i < position_; ++i) value.text += static_cast<char>(content_[i]);
    return value;
}

std::string JsonReader::read_text() {
    std::string text;
    expect("\"");
    while (!accept('"')) {
        const int letter = peek();
        if (letter < 0x20) wrong(letter < 0 ? "a text without its end" : "a control character");
        ++position_;
        if (letter == '\\') {
            append_utf8(text, read_escaped());
        } else {
            text += static_cast<char>(static_cast<unsigned char>(letter));
        }
    }
    return text;
}

std::uint32_t JsonReader::read_escaped() {
    constexpr const char* kNames = "\"\\/bfnrt";
    constexpr const char* kMeanings = "\"\\/\b\f\n\r\t";
    const int letter = peek();
    if (letter > 0 && letter < 0x80) {
        if (const char* found = std::strchr(kNames, letter)) {
            ++position_;
            return static_cast<unsigned char>(kMeanings[found - kNames]);
        }
    }
    if (!accept('u')) wrong("an unknown escape");
    const std::uint32_t high = read_hexadecimal();
    if (high < 0xd800 || high >= 0xe000) return high;
    if (high >= 0xdc00 || !accept('\\') || !accept('u')) wrong("half of a character");
    const std::uint32_t low = read_hexadecimal();
    if (low < 0xdc00 || low >= 0xe000) wrong("half of a character");
    return 0x10000 + ((high - 0xd800) << 10 | (low - 0xdc00));
}

std::uint32_t JsonReader::read_hexadecimal() {
    std::uint32_t number = 0;
    for (int i = 0; i < 4; ++i, ++position_) {
        const int letter = peek();
        const int digit = letter >= '0' && letter <= '9'   ? letter - '0'
                          : letter >= 'a' && letter <= 'f' ? letter - 'a' + 10
                          : letter >= 'A' && letter <= 'F' ? letter - 'A' + 10
                                                           : -1;
        if (digit < 0) wrong("an unknown escape");
        number = number << 4 | static_cast<std::uint32_t>(digit);
    }
    return number;
}

// ----------------------------------------------------------------------------------------------------- typed JSON

// The number that a text is, whatever the locale; NaN where it is none.
double number_from_text(const std::string& text) {
    std::istringstream stream(text);
    stream.exceptions(std::ios::badbit);  // else memory that does not suffice would look like a text that is no number
    stream.imbue(std::locale::classic());
    double number = 0;
    if (!(stream >> number) || stream.peek() != std::istringstream::traits_type::eof()) return std::nan("");
    return number;
}

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts;
    for (std::size_t start = 0, end = 0; end != std::string::npos; start = end + 1) {
        end = text.find(separator, start);
        parts.push_back(text.substr(start, end - start));
    }
    return parts;
}

bool is_plain(const std::string& text) {
    for (std::size_t i = 0; i < text.size(); ++i) {
        const auto byte = static_cast<unsigned char>(text[i]);
        const bool second_set = byte == 0xc2 && static_cast<unsigned char>(text[i + 1]) < 0xa0;  // U+0080 to U+009F
        if (byte < 0x20 || byte == 0x7f || second_set) return false;
    }
    return true;
}

// A value and its place in the file, as in profile.input[0]. What does not fit is thrown as Malformed.
class Value {
  public:
    Value(const Json& json, std::string place) : json_(json), place_(std::move(place)) {}

    [[noreturn]] void wrong(const std::string& expected) const {
        throw Malformed{(place_.empty() ? "the file" : place_) + ": expected " + expected};
    }

    const std::vector<std::string>& names() const {
        if (json_.kind != Json::Kind::kObject) wrong("an object");
        return json_.names;
    }

    bool has(const std::string& name) const { return std::find(names().begin(), names().end(), name) != names().end(); }

    Value field(const std::string& name) const {
        const auto found = std::find(names().begin(), names().end(), name);
        const std::string inner = place_.empty() ? name : place_ + "." + name;
        if (found == names().end()) throw Malformed{inner + ": missing"};
        return Value(json_.entries[static_cast<std::size_t>(found - json_.names.begin())], inner);
    }

    // Every value of an object, each at its name's place.
    std::vector<Value> fields() const {
        std::vector<Value> values;
        for (std::size_t i = 0; i < names().size(); ++i) {
            values.emplace_back(json_.entries[i], place_.empty() ? json_.names[i] : place_ + "." + json_.names[i]);
        }
        return values;
    }

    // Refuses an object without one of these, or with another.
    void check_names(const std::vector<std::string>& expected) const {
        for (const std::string& name : expected) field(name);
        for (const std::string& name : names()) {
            if (std::find(expected.begin(), expected.end(), name) == expected.end()) {
                throw Malformed{field(name).place_ + ": not a name that belongs here"};
            }
        }
    }

    std::vector<Value> entries() const {
        if (json_.kind != Json::Kind::kList) wrong("a list");
        std::vector<Value> values;
        for (std::size_t i = 0; i < json_.entries.size(); ++i) {
            values.emplace_back(json_.entries[i], place_ + "[" + std::to_string(i) + "]");
        }
        return values;
    }

    std::vector<Value> entries(std::size_t count) const {
        if (entries().size() != count) wrong("a list of " + std::to_string(count));
        return entries();
    }

    bool is_text() const { return json_.kind == Json::Kind::kText; }

    const std::string& text() const {
        if (!is_text() || json_.text.empty() || !is_plain(json_.text)) wrong("a text");
        return json_.text;
    }

    std::string one_of(const std::vector<std::string>& choices) const {
        if (!is_text() || std::find(choices.begin(), choices.end(), json_.text) == choices.end()) {
            wrong("one of " + joined(choices, ", "));
        }
        return json_.text;
    }

    std::string file_name() const {
        if (text() == "." || text() == ".." || text().find_first_of("/\\") != std::string::npos) {
            wrong("a plain file name");
        }
        return text();
    }

    std::string sha256() const {
        if (text().size() != 64 || text().find_first_not_of("0123456789abcdef") != std::string::npos) {
            wrong("64 hexadecimal digits");
        }
        return text();
    }

    void check_boolean() const {
        if (json_.kind != Json::Kind::kBoolean) wrong("true or false");
    }

    int whole_number(int least) const {
        const double number = json_.kind == Json::Kind::kNumber ? number_from_text(json_.text) : std::nan("");
        const bool written_whole = json_.text.find_first_of(".eE") == std::string::npos;
        if (!written_whole || !(number >= least && number <= std::numeric_limits<int>::max())) {
            wrong("a whole number of at least " + std::to_string(least));
        }
        return static_cast<int>(number);
    }

    std::vector<int> whole_numbers(int least) const {
        std::vector<int> numbers;
        for (const Value& entry : entries()) numbers.push_back(entry.whole_number(least));
        return numbers;
    }

    double number() const {
        const double number = json_.kind == Json::Kind::kNumber ? number_from_text(json_.text) : std::nan("");
        if (!std::isfinite(number)) wrong("a finite number");
        return number;
    }

    double positive_number() const {
        if (!(number() > 0)) wrong("a number above 0");
        return number();
    }

  private:
    const Json& json_;
    std::string place_;
};

// -------------------------------------------------------------------------------------------------------- the sidecar

// As engines/manifest.py reads it: every field is there, has its type and agrees with the others.
struct Sidecar {
    Description description;
    std::string engine_sha256;
};

constexpr std::uintmax_t kLargestSidecar = std::uintmax_t{1} << 24;
constexpr int kFree = -1;

bool is_letter(char letter) { return (letter >= 'a' && letter <= 'z') || (letter >= 'A' && letter <= 'Z'); }
bool is_digit(char letter) { return letter >= '0' && letter <= '9'; }
bool is_word_letter(char letter) { return is_letter(letter) || is_digit(letter) || letter == '_'; }

// As in 1.7.1.116 or 10.13.3.9.post1.
bool is_version(const std::string& text) {
    const std::vector<std::string> parts = split(text, '.');
    for (const std::string& part : parts) {
        const auto fits = &part == &parts[0] ? is_digit : is_word_letter;
        if (part.empty() || !std::all_of(part.begin(), part.end(), fits)) return false;
    }
    return parts.size() > 1;
}

// A size, or the name of one that is free.
int extent_of(const Value& value) {
    if (!value.is_text()) return value.whole_number(1);
    const std::string& name = value.text();
    if (is_digit(name[0]) || !std::all_of(name.begin(), name.end(), is_word_letter)) value.wrong("a size or its name");
    return kFree;
}

std::vector<Tensor> tensors_of(const Value& value) {
    std::vector<Tensor> tensors;
    for (const Value& entry : value.entries()) {
        entry.check_names({"name", "dtype", "shape"});
        Tensor tensor;
        tensor.name = entry.field("name").text();
        entry.field("dtype").one_of({"float32", "float16", "int8", "int32", "int64"});
        for (const Value& extent : entry.field("shape").entries()) tensor.shape.push_back(extent_of(extent));
        if (tensor.shape.empty()) entry.field("shape").wrong("a shape that begins with the batch");
        for (const Tensor& other : tensors) {
            if (other.name == tensor.name) value.wrong("one or more tensors of different names");
        }
        tensors.push_back(std::move(tensor));
    }
    if (tensors.empty()) value.wrong("one or more tensors of different names");
    return tensors;
}

using Profile = std::array<std::vector<int>, 3>;

// Smallest, usual and largest shape, each extent no smaller than in the one before.
bool is_ordered(const Profile& profile) {
    for (std::size_t i = 1; i < profile.size(); ++i) {
        if (profile[i].size() != profile[0].size()) return false;
        for (std::size_t axis = 0; axis < profile[0].size(); ++axis) {
            if (profile[i - 1][axis] > profile[i][axis]) return false;
        }
    }
    return true;
}

bool is_form_of(const std::vector<int>& shape, const std::vector<int>& form) {
    const auto fits = [](int extent, int expected) { return expected == kFree || extent == expected; };
    return shape.size() == form.size() && std::equal(shape.begin(), shape.end(), form.begin(), fits);
}

Profile profile_of(const Value& value, const Tensor& input) {
    Profile profile;
    const std::vector<Value> shapes = value.entries(3);
    for (std::size_t i = 0; i < 3; ++i) profile[i] = shapes[i].whole_numbers(1);
    if (!is_ordered(profile)) value.wrong("three shapes, minimum <= optimum <= maximum");
    for (const std::vector<int>& shape : profile) {
        if (!is_form_of(shape, input.shape)) value.wrong("shapes of the input's form");
    }
    return profile;
}

struct Preprocessing {
    std::vector<double> mean, std;
    int height, width, channels;
};

// As the exporter writes them: separated by commas, each in six digits, or in as many as it takes.
std::string text_of_numbers(const std::vector<double>& numbers) {
    std::vector<std::string> texts;
    for (const double number : numbers) {
        std::string text;
        for (int digits = 6; digits <= 17 && number_from_text(text) != number; ++digits) {
            std::ostringstream stream;
            stream.exceptions(std::ios::badbit);
            stream.imbue(std::locale::classic());
            stream.precision(digits);
            stream << number;
            text = stream.str();
        }
        texts.push_back(text);
    }
    return joined(texts, ",");
}

Preprocessing preprocessing_of(const Value& value, const Value& assumptions) {
    const bool resized = value.has("resize");
    std::vector<std::string> names = {"mean", "std", "size", "channels"};
    if (resized) names.emplace_back("resize");
    value.check_names(names);
    Preprocessing found{};
    found.channels = value.field("channels").whole_number(1);
    const auto count = static_cast<std::size_t>(found.channels);
    for (const Value& entry : value.field("mean").entries(count)) found.mean.push_back(entry.number());
    for (const Value& entry : value.field("std").entries(count)) found.std.push_back(entry.positive_number());
    const std::vector<Value> size = value.field("size").entries(2);
    found.height = size[0].whole_number(1);
    found.width = size[1].whole_number(1);
    for (const char* name : {"mean", "std"}) {
        const std::vector<double>& numbers = name[0] == 'm' ? found.mean : found.std;
        if (assumptions.has(name) && assumptions.field(name).text() != text_of_numbers(numbers)) {
            value.field(name).wrong(std::string("what assumptions.") + name + " says");
        }
    }
    const std::string resize =
        resized ? std::to_string(value.field("resize").whole_number(std::max(found.height, found.width))) : "";
    const std::string assumed = assumptions.has("resize") ? assumptions.field("resize").text() : "";
    if (resize != assumed) value.wrong("a resize as in assumptions.resize");
    return found;
}

// Images are prepared in the usual size of the profile; what is assumed is one size for all, or three.
void check_sizes(const Value& fields, const Profile& profile, const Preprocessing& preprocessing) {
    std::vector<std::string> sizes;
    for (const std::vector<int>& shape : profile) sizes.push_back(text_of_size(shape[2], shape[3]));
    const bool one_size = sizes[0] == sizes[1] && sizes[1] == sizes[2];
    const Value assumptions = fields.field("assumptions");
    const std::string all = joined(sizes, ":");
    const std::string assumed = assumptions.has("size") ? assumptions.field("size").text() : all;
    const std::vector<int> prepared = {preprocessing.channels, preprocessing.height, preprocessing.width};
    if (!std::equal(prepared.begin(), prepared.end(), profile[1].begin() + 1)) {
        fields.field("preprocessing").wrong("images of the input's form, in its usual size");
    }
    if (assumed != all && !(one_size && assumed == sizes[0])) {
        fields.field("profile").wrong("shapes of " + assumed + ", as in assumptions.size");
    }
}

void check_audit(const Value& audit) {
    audit.field("audited").check_boolean();
    audit.field("line").text();
    if (!audit.field("problems").entries().empty()) {
        audit.field("problems").wrong("none, since no engine with any is ever delivered");
    }
}

std::vector<int> cards_of(const Value& value) {
    std::vector<int> cards = value.whole_numbers(10);
    std::sort(cards.begin(), cards.end());
    const bool twice = std::adjacent_find(cards.begin(), cards.end()) != cards.end();
    if (twice || (!cards.empty() && cards.back() > 999)) value.wrong("compute capabilities such as 86, each once");
    return cards;
}

Sidecar sidecar_from_json(const Json& json) {
    const Value file(json, "");
    if (file.field("schema").whole_number(1) != 1) file.field("schema").wrong("1, the only one that is read here");
    file.check_names({"schema", "name", "precision", "sha256", "sdk", "compute_capabilities", "inputs", "outputs",
                      "profile", "preprocessing", "assumptions", "tolerance", "audit", "golden"});
    Sidecar sidecar;
    Description& description = sidecar.description;
    file.field("name").file_name();
    description.precision = file.field("precision").text();
    const Value hashes = file.field("sha256");
    hashes.check_names({"checkpoint", "onnx", "engine"});
    for (const Value& hash : hashes.fields()) hash.sha256();
    sidecar.engine_sha256 = hashes.field("engine").sha256();
    const Value sdk = file.field("sdk");
    sdk.check_names({"name", "version"});
    description.sdk = sdk.field("name").one_of({"tensorrt", "tensorrt_rtx"});
    description.sdk_version = sdk.field("version").text();
    if (!is_version(description.sdk_version)) sdk.field("version").wrong("a version such as 1.7.1.116");
    description.cards = cards_of(file.field("compute_capabilities"));
    const std::vector<Tensor> inputs = tensors_of(file.field("inputs"));
    if (inputs.size() != 1) file.field("inputs").wrong("one input, which is all that is run here");
    description.input = inputs[0];
    description.outputs = tensors_of(file.field("outputs"));
    file.field("profile").check_names({description.input.name});
    description.profile = profile_of(file.field("profile").field(description.input.name), description.input);
    const Value assumptions = file.field("assumptions");
    for (const Value& assumption : assumptions.fields()) assumption.text();
    const Preprocessing preprocessing = preprocessing_of(file.field("preprocessing"), assumptions);
    description.mean = preprocessing.mean;
    description.std = preprocessing.std;
    if (description.input.shape.size() == 4) check_sizes(file, description.profile, preprocessing);
    description.tolerance = file.field("tolerance").positive_number();
    if (!(description.tolerance < 1)) file.field("tolerance").wrong("a relative error below 1");
    check_audit(file.field("audit"));
    description.golden = file.field("golden").file_name();
    return sidecar;
}

Sidecar sidecar_from_file(const std::string& path) {
    const std::vector<unsigned char> content = bytes_of_file(path, kLargestSidecar);
    try {
        return sidecar_from_json(JsonReader(content).whole());
    } catch (const Malformed& malformed) {
        refuse(Code::kFile, path + ": " + malformed.problem +
                                "; this sidecar is damaged or was edited: put the one back that was written with the "
                                "engine, or build the engine again");
    }
}

// ---------------------------------------------------------------------------------------- the header of an engine file

// The first 64 bytes; see engines/plan.py. Of a full TensorRT engine only the tag is known.
struct Header {
    std::string sdk;
    std::string version;
    std::vector<int> cards;
    bool newer_cards = false;  // also runs on cards that are newer than any of these
};

constexpr std::size_t kHeaderBytes = 64;
constexpr std::array<int, 6> kCardBits = {75, 80, 86, 89, 120, 121};
constexpr unsigned kNewerCardsBit = 6;
constexpr const char* kBuildAgain = "; build it again with python -m engines build";

[[noreturn]] void refuse_engine(const std::string& path, const std::string& problem) {
    refuse(Code::kFile, path + ": " + problem + kBuildAgain);
}

std::uint64_t little_endian(const unsigned char* bytes, unsigned count) {
    std::uint64_t number = 0;
    for (unsigned i = 0; i < count; ++i) number |= std::uint64_t{bytes[i]} << 8 * i;
    return number;
}

Header header_from_bytes(const std::vector<unsigned char>& data, const std::string& path) {
    if (data.size() < kHeaderBytes) {
        refuse_engine(path, std::to_string(data.size()) + " bytes are too few for an engine");
    }
    const std::string tag(data.begin(), data.begin() + 4);
    Header header;
    if (tag == "ftrt") {
        header.sdk = "tensorrt";
        return header;
    }
    if (tag != "vtrt") refuse_engine(path, "not a TensorRT engine");
    header.sdk = "tensorrt_rtx";
    if (little_endian(&data[8], 8) != 2 || std::memcmp(&data[28], tag.data(), 4) != 0) {
        refuse_engine(path, "its header is of another format");
    }
    const std::uint64_t size = little_endian(&data[16], 8);
    if (size != data.size()) {
        refuse_engine(
            path, "the header says " + std::to_string(size) + " bytes, the file has " + std::to_string(data.size()));
    }
    std::vector<std::string> parts;
    for (std::size_t i = 24; i < 28; ++i) parts.push_back(std::to_string(data[i]));
    header.version = joined(parts, ".");
    const std::uint64_t mask = little_endian(&data[32], 4);
    for (unsigned bit = 0; bit < kCardBits.size(); ++bit) {
        if (mask >> bit & 1) header.cards.push_back(kCardBits[bit]);
    }
    header.newer_cards = mask >> kNewerCardsBit & 1;
    return header;
}

void check_header(const std::string& path, const Header& header, const Description& description) {
    const auto check = [&path](const char* what, const std::string& found, const std::string& said) {
        if (found == said) return;
        refuse_engine(path, std::string("its header says ") + what + " " + found + ", its sidecar " + said);
    };
    check("SDK", header.sdk, description.sdk);
    if (header.sdk != "tensorrt_rtx") return;
    check("version", header.version, description.sdk_version);
    check("cards", text_of_cards(header.cards), text_of_cards(description.cards));
}

// ------------------------------------------------------------------------------------------ calls of TensorRT and CUDA

#ifdef TRT_MAJOR_RTX
constexpr const char* kSdk = "tensorrt_rtx";
#else
constexpr const char* kSdk = "tensorrt";
#endif

const char* title_of(const std::string& sdk) { return sdk == "tensorrt_rtx" ? "TensorRT for RTX" : "TensorRT"; }

// TensorRT's reasons for a refusal, which it tells a logger in the thread of the call.
class Logger final : public nvinfer1::ILogger {
  public:
    void log(Severity severity, const char* message) noexcept override {
        if (severity != Severity::kERROR && severity != Severity::kINTERNAL_ERROR) return;
        const std::size_t used = std::strlen(words());
        std::snprintf(words() + used, kRoom - used, "%s%s", used > 0 ? "; " : "", message);
    }

    static const char* said() noexcept { return words()[0] == '\0' ? "it gave no reason" : words(); }
    static void forget() noexcept { words()[0] = '\0'; }

  private:
    static constexpr std::size_t kRoom = 384;

    static char* words() noexcept {
        thread_local char text[kRoom] = "";
        return text;
    }
};

// TensorRT keeps the first logger that a process gives it, so there is one and it is never destroyed.
Logger& the_logger() {
    static Logger* const logger = new Logger;
    return *logger;
}

const char* remedy_of(cudaError_t error) {
    switch (error) {
        case cudaErrorMemoryAllocation:
            return "free memory on the GPU, or build the engine with a smaller maximum batch";
        case cudaErrorInsufficientDriver:
            return "update the GPU's driver";
        case cudaErrorNoDevice:
        case cudaErrorInvalidDevice:
            return "check with nvidia-smi that this process may see that GPU";
        default:
            return "check the GPU with nvidia-smi and start the process again";
    }
}

Code code_of(cudaError_t error) { return error == cudaErrorMemoryAllocation ? Code::kDeviceMemory : Code::kDevice; }

// CUDA keeps a thread's last error; the next library to ask would take it for its own.
cudaError_t take_last_error() noexcept { return cudaGetLastError(); }

// For calls that free or give back, where nothing more can be done about a failure.
void disregard(cudaError_t error) noexcept {
    if (error != cudaSuccess) static_cast<void>(take_last_error());
}

std::string text_of_failure(const char* call, cudaError_t error) {
    return std::string(call) + " failed: " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + "); ";
}

void check(cudaError_t error, const char* call) {
    if (error == cudaSuccess) return;
    disregard(error);
    refuse(code_of(error), text_of_failure(call, error) + remedy_of(error));
}

// TensorRT answers no more than that it failed; the reason is in its log, and what CUDA told it is CUDA's last error.
[[noreturn]] void refuse_answer(const char* call) {
    const cudaError_t error = take_last_error();
    refuse(code_of(error),
           std::string(title_of(kSdk)) + ": " + call + " failed: " + Logger::said() + "; " + remedy_of(error));
}

void answered(bool succeeded, const char* call) {
    if (!succeeded) refuse_answer(call);
}

template <typename Made>
std::unique_ptr<Made> made(Made* thing, const char* call) {
    if (thing == nullptr) refuse_answer(call);
    return std::unique_ptr<Made>(thing);
}

// Something of the CUDA runtime that is given back once.
template <typename Handle, auto Free>
class Owned {
  public:
    Owned() noexcept = default;
    explicit Owned(Handle handle) noexcept : handle_(handle) {}
    Owned(Owned&& other) noexcept : handle_(std::exchange(other.handle_, Handle{})) {}
    Owned& operator=(Owned&& other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    ~Owned() {
        if (handle_ != Handle{}) disregard(Free(handle_));
    }
    Handle get() const noexcept { return handle_; }

  private:
    Handle handle_{};
};

using DeviceMemory = Owned<void*, cudaFree>;
using PinnedMemory = Owned<void*, cudaFreeHost>;
using Stream = Owned<cudaStream_t, cudaStreamDestroy>;
using Event = Owned<cudaEvent_t, cudaEventDestroy>;
using Graph = Owned<cudaGraph_t, cudaGraphDestroy>;
using Executable = Owned<cudaGraphExec_t, cudaGraphExecDestroy>;

DeviceMemory device_memory(std::size_t size) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, std::max<std::size_t>(size, 1)), "cudaMalloc");
    return DeviceMemory(memory);
}

PinnedMemory pinned_memory(std::size_t size) {
    void* memory = nullptr;
    const cudaError_t error = cudaMallocHost(&memory, std::max<std::size_t>(size, 1));
    if (error == cudaErrorMemoryAllocation) {  // of the host, and locked, which the system may limit
        disregard(error);
        refuse(Code::kHostMemory, text_of_failure("cudaMallocHost", error) +
                                      "free memory on this machine, or build the engine with a smaller maximum batch");
    }
    check(error, "cudaMallocHost");
    return PinnedMemory(memory);
}

// Makes `device` the thread's current one, and the caller's again at the end.
class Selected {
  public:
    explicit Selected(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (before_ == device) return;
        check(cudaSetDevice(device), "cudaSetDevice");
        changed_ = true;
    }
    Selected(const Selected&) = delete;
    Selected& operator=(const Selected&) = delete;
    ~Selected() {
        if (changed_) disregard(cudaSetDevice(before_));
    }

  private:
    int before_ = 0;
    bool changed_ = false;
};

// The work of a stream, which is over before anything it works on is freed, however the block around it is left.
class Work {
  public:
    explicit Work(cudaStream_t stream) noexcept : stream_(stream) {}
    Work(const Work&) = delete;
    Work& operator=(const Work&) = delete;
    ~Work() {
        if (!waited_) disregard(cudaStreamSynchronize(stream_));
    }
    void wait() {
        waited_ = true;
        check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    }

  private:
    cudaStream_t stream_;
    bool waited_ = false;
};

// Frees things of `device` by `release`, on that device as far as it can be selected.
template <typename Release>
void on_device(int device, const Release& release) noexcept {
    const Status selected = guarded([&] {
        const Selected current(device);
        release();
    });
    if (!selected.ok()) release();
}

// Bytes of so many floats; refuses what no machine has.
std::size_t bytes_of(const std::vector<int>& shape) {
    std::size_t size = sizeof(float);
    for (const int extent : shape) {
        const auto factor = static_cast<std::size_t>(extent);
        if (extent < 1 || size > std::numeric_limits<std::size_t>::max() / factor) {
            refuse(Code::kFile, "a tensor of the engine has an impossible shape" + std::string(kBuildAgain));
        }
        size *= factor;
    }
    return size;
}

std::vector<int> shape_of(const nvinfer1::Dims& dims) {
    answered(dims.nbDims >= 0, "asking for a shape");
    std::vector<int> shape;
    for (int i = 0; i < std::min<int>(dims.nbDims, nvinfer1::Dims::MAX_DIMS); ++i) {
        const auto extent = std::clamp<std::int64_t>(dims.d[i], kFree, std::numeric_limits<int>::max());
        shape.push_back(static_cast<int>(extent));
    }
    return shape;
}

nvinfer1::Dims dims_of(const std::vector<int>& shape) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<int>(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
}

// Only TensorRT for RTX can say whether what a context does can be recorded; elsewhere recording it tells.
template <typename AnyContext>
auto is_capturable(const AnyContext& context, cudaStream_t stream, int)
    -> decltype(context.isStreamCapturable(stream)) {
    return context.isStreamCapturable(stream);
}
template <typename AnyContext>
bool is_capturable(const AnyContext&, cudaStream_t, long) {
    return true;
}

// ------------------------------------------------------------------------------------------------- the runtime cache

constexpr const char* kNoCacheNamed = "no runtime cache was named when the engine was loaded";

#ifdef TRT_MAJOR_RTX

// The kernels that are compiled at run time, and the file they are kept in, which engines/runtime_cache.py documents,
// reads and writes as well: a header of five lines, made anew to be compared, then what the SDK serialized. They only
// save time, so nothing that goes wrong here keeps an engine from being loaded.
class RuntimeCache {
  public:
    static constexpr bool kIsKept = true;

    // Lets the contexts that are made with `config` take kernels from the file at `path`, and add theirs to them.
    void use(const char* path, const std::string& engine_sha256, const std::string& sdk_version, int card,
             nvinfer1::IRuntimeConfig& config) noexcept {
        Status unread;
        const Status unused = guarded([&] {
            path_ = path;
            owner_ = "repvgg runtime cache 1\n" + engine_sha256 + "\n" + sdk_version + "\n";
            owner_ += "sm" + std::to_string(card) + "\n";
            cache_ = made(config.createRuntimeCache(), "createRuntimeCache");
            unread = guarded([&] { read(); });
            answered(config.setRuntimeCache(*cache_), "setRuntimeCache");
            in_use_ = true;
        });
        refusal_ = unused.ok() ? unread : unused;
        static_cast<void>(take_last_error());
        Logger::forget();
    }

    const char* refusal() const noexcept { return refusal_.message(); }

    void save() {
        if (!in_use_ && !refusal_.ok()) throw Refused{refusal_};
        if (!in_use_) refuse(Code::kUsage, kNoCacheNamed);
        const std::unique_ptr<nvinfer1::IHostMemory> kernels = made(cache_->serialize(), "serialize");
        const std::string header = header_of(kernels->data(), kernels->size());
        if (kernels->size() == 0 || header == written_) return;
        UnfinishedFile file(path_);
        file.add(header.data(), header.size());
        file.add(kernels->data(), kernels->size());
        file.finish();
        written_ = header;
    }

  private:
    static constexpr std::uintmax_t kLargest = std::uintmax_t{1} << 30;

    std::string header_of(const void* kernels, std::size_t size) const {
        return owner_ + hexadecimal(sha256(kernels, size)) + "\n";
    }

    void read() {
        std::error_code error;
        if (!std::filesystem::exists(path_, error)) refuse(Code::kFile, path_ + ": is not there yet");
        const std::vector<unsigned char> content = bytes_of_file(path_, kLargest);
        const std::size_t start = std::min(header_of(nullptr, 0).size(), content.size()), size = content.size() - start;
        const std::string header = header_of(content.data() + start, size);
        if (size == 0 || !std::equal(header.begin(), header.end(), content.begin())) {
            refuse(Code::kFile, path_ + ": damaged, or of another engine, version or card");
        }
        if (!cache_->deserialize(content.data() + start, size)) {
            refuse(Code::kFile, path_ + ": of another driver or GPU (" + Logger::said() + ")");
        }
        written_ = header;
    }

    std::string path_, owner_;  // the file, and the lines that say what its kernels are for
    std::string written_;       // the header of the file as it was read or written last
    std::unique_ptr<nvinfer1::IRuntimeCache> cache_;
    bool in_use_ = false;
    Status refusal_;
};

#else

// Full TensorRT compiles nothing at run time.
class RuntimeCache {
  public:
    static constexpr bool kIsKept = false;
    void use(const char*, const std::string&, const std::string&, int, nvinfer1::IRuntimeConfig&) noexcept {}
    const char* refusal() const noexcept { return ""; }
    void save() { refuse(Code::kUsage, kNoCacheNamed); }
};

#endif

}  // namespace

// ------------------------------------------------------------------------------------------------- the loaded engine

namespace internal {

// TensorRT lets threads run contexts of one engine at once, and promises nothing for two that make or free some.
struct FreesContext {
    std::mutex* turn;
    void operator()(nvinfer1::IExecutionContext* context) const noexcept {
        const std::lock_guard<std::mutex> lock(*turn);
        delete context;
    }
};
using OwnedContext = std::unique_ptr<nvinfer1::IExecutionContext, FreesContext>;

// Members are freed from the last to the first.
struct LoadedEngine {
    int device = 0;
    Description description;
    std::size_t activations = 0;  // bytes that a context needs
    std::unique_ptr<nvinfer1::IRuntime> runtime;
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
    mutable RuntimeCache cache;
    std::unique_ptr<nvinfer1::IRuntimeConfig> config;
    mutable std::mutex turn;            // to make or free a context
    mutable std::shared_mutex kernels;  // shared by those that may compile some; to serialize them it is held alone

    // A context whose activations lie in `memory`; contexts that share it must take turns.
    OwnedContext new_context(const DeviceMemory& memory) const {
        const std::lock_guard<std::mutex> lock(turn);
        const std::shared_lock<std::shared_mutex> compiling(kernels);
        OwnedContext context(made(engine->createExecutionContext(config.get()), "createExecutionContext").release(),
                             FreesContext{&turn});
        context->setDeviceMemoryV2(memory.get(), static_cast<std::int64_t>(activations));
        return context;
    }
};

}  // namespace internal

namespace {

using internal::LoadedEngine;

void check_sdk(const std::string& path, const Description& description) {
    if (description.sdk == kSdk) return;
    refuse(Code::kDevice, path + ": needs " + title_of(description.sdk) + " " + description.sdk_version +
                              ", and this program is linked with " + title_of(kSdk) +
                              "; build the program with that SDK, or the engine with python -m engines build --sdk " +
                              kSdk);
}

// The library is that of the headers this was compiled with, and made the engine. TensorRT keeps its interface within a
// major version, TensorRT for RTX within a minor one; neither notices another header.
void check_versions(const std::string& path, const Description& description) {
    const std::array<int, 4> library = {getInferLibMajorVersion(), getInferLibMinorVersion(), getInferLibPatchVersion(),
                                        getInferLibBuildVersion()};
    std::vector<std::string> parts;
    for (const int part : library) parts.push_back(std::to_string(part));
    const std::string installed = joined(parts, ".");
    const bool rtx = description.sdk == "tensorrt_rtx";
    const bool same_major = library[0] == NV_TENSORRT_MAJOR;
    if (!same_major || (rtx ? library[1] != NV_TENSORRT_MINOR : library[1] < NV_TENSORRT_MINOR)) {
        refuse(Code::kDevice, std::string(title_of(kSdk)) + " " + installed +
                                  " is installed here, and this program was compiled with the headers of " +
                                  std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR) +
                                  "; build the program with the installed ones");
    }
    const std::string& made_by = description.sdk_version;
    const bool same = made_by == installed || made_by.compare(0, installed.size() + 1, installed + ".") == 0;
    if (same) return;
    refuse(Code::kDevice, path + ": made by " + title_of(kSdk) + " " + made_by + ", and " + installed +
                              " is installed here; install " + made_by +
                              ", or build the engine again with python -m engines build --sdk " + kSdk);
}

// The compute capability of the GPU, as in 86, which must be one of the engine's.
int checked_card(const std::string& path, const Header& header, const Description& description, int device) {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count < 1) {
        static_cast<void>(cudaGetLastError());
        const std::string reason = error == cudaSuccess ? "" : std::string(" (") + cudaGetErrorName(error) + ")";
        refuse(Code::kDevice,
               path + ": no GPU answers here" + reason + ", and an engine runs on nothing else; run its ONNX file");
    }
    if (device >= count) {
        refuse(Code::kDevice, path + ": there is no GPU of index " + std::to_string(device) + " here, but " +
                                  std::to_string(count) + "; check with nvidia-smi that this process may see it");
    }
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
    const int card = major * 10 + minor;
    const std::vector<int>& cards = header.cards.empty() ? description.cards : header.cards;
    const bool named = std::find(cards.begin(), cards.end(), card) != cards.end();
    if (!cards.empty() && !named && !(header.newer_cards && card > *std::max_element(cards.begin(), cards.end()))) {
        refuse(Code::kDevice, path + ": built for " + text_of_cards(cards) + ", and this GPU is sm" +
                                  std::to_string(card) + kBuildAgain + " --sdk " + kSdk + " for this card");
    }
    return card;
}

// Inputs and outputs are those of the sidecar, float32, plain arrays on the GPU.
void check_tensors(const std::string& path, const nvinfer1::ICudaEngine& engine, const Description& description) {
    const auto expected = static_cast<int>(1 + description.outputs.size());
    if (engine.getNbIOTensors() != expected) {
        refuse_engine(path, "it has " + std::to_string(engine.getNbIOTensors()) + " inputs and outputs, its sidecar " +
                                std::to_string(expected));
    }
    const auto check_tensor = [&](const Tensor& tensor, nvinfer1::TensorIOMode mode) {
        const char* name = tensor.name.c_str();
        if (engine.getTensorIOMode(name) != mode || !is_form_of(shape_of(engine.getTensorShape(name)), tensor.shape)) {
            refuse_engine(path, tensor.name + " is not what its sidecar says");
        }
        if (engine.getTensorDataType(name) != nvinfer1::DataType::kFLOAT ||
            engine.getTensorLocation(name) != nvinfer1::TensorLocation::kDEVICE ||
            engine.getTensorFormat(name) != nvinfer1::TensorFormat::kLINEAR) {
            refuse_engine(path, tensor.name + " is not a plain array of float32 on the GPU");
        }
    };
    check_tensor(description.input, nvinfer1::TensorIOMode::kINPUT);
    for (const Tensor& output : description.outputs) check_tensor(output, nvinfer1::TensorIOMode::kOUTPUT);
}

// The engine's own profile; of several the first is used.
Profile profile_of_engine(const std::string& path, const nvinfer1::ICudaEngine& engine, const Tensor& input) {
    using Selector = nvinfer1::OptProfileSelector;
    Profile profile;
    constexpr std::array<Selector, 3> kSelectors = {Selector::kMIN, Selector::kOPT, Selector::kMAX};
    for (std::size_t i = 0; i < profile.size(); ++i) {
        profile[i] = shape_of(engine.getProfileShape(input.name.c_str(), 0, kSelectors[i]));
        const bool positive = std::all_of(profile[i].begin(), profile[i].end(), [](int extent) { return extent > 0; });
        if (!positive || !is_form_of(profile[i], input.shape)) {
            refuse_engine(path, "its profile is not one of its input");
        }
    }
    if (!is_ordered(profile)) refuse_engine(path, "its profile contradicts itself");
    return profile;
}

void deserialize(LoadedEngine& loaded, const std::string& path, const std::vector<unsigned char>& content) {
    loaded.runtime = made(nvinfer1::createInferRuntime(the_logger()), "createInferRuntime");
    loaded.engine =
        made(loaded.runtime->deserializeCudaEngine(content.data(), content.size()), "deserializeCudaEngine");
    check_tensors(path, *loaded.engine, loaded.description);
    loaded.description.profile = profile_of_engine(path, *loaded.engine, loaded.description.input);
    loaded.config = made(loaded.engine->createRuntimeConfig(), "createRuntimeConfig");
    loaded.config->setExecutionContextAllocationStrategy(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
#ifdef TRT_MAJOR_RTX
    // By default the first few runs of a shape would use other kernels than the later ones, and a graph too.
    loaded.config->setDynamicShapesKernelSpecializationStrategy(
        nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
#endif
    const std::int64_t activations = loaded.engine->getDeviceMemorySizeV2();
    answered(activations >= 0, "getDeviceMemorySizeV2");
    loaded.activations = static_cast<std::size_t>(std::max<std::int64_t>(activations, 1));
}

struct DestroyOnDevice {
    int device;
    void operator()(LoadedEngine* engine) const noexcept {
        on_device(device, [engine] { delete engine; });
    }
};

std::shared_ptr<const LoadedEngine> loaded_from_file(const std::string& path, const LoadOptions& options) {
    std::error_code error;
    if (!std::filesystem::is_regular_file(path, error)) refuse(Code::kFile, path + ": no such engine; check the path");
    const std::string sidecar_path = path + ".json";
    if (!std::filesystem::exists(sidecar_path, error)) {
        refuse(Code::kFile, path + ": its sidecar " + std::filesystem::path(sidecar_path).filename().string() +
                                " is missing, so nothing says what this engine is; put it beside, or" +
                                std::string(kBuildAgain).substr(1));
    }
    const Sidecar sidecar = sidecar_from_file(sidecar_path);
    const std::vector<unsigned char> content = bytes_of_file(path, std::numeric_limits<std::size_t>::max());
    const std::string digest = hexadecimal(sha256(content.data(), content.size()));
    if (digest != sidecar.engine_sha256) {
        refuse_engine(path, "its SHA-256 is " + digest.substr(0, 12) + "..., its sidecar's is " +
                                sidecar.engine_sha256.substr(0, 12) +
                                "...: damaged, replaced, or the sidecar is another engine's");
    }
    const Header header = header_from_bytes(content, path);
    check_header(path, header, sidecar.description);
    check_sdk(path, sidecar.description);
    check_versions(path, sidecar.description);
    const int card = checked_card(path, header, sidecar.description, options.device);

    const Selected current(options.device);
    std::unique_ptr<LoadedEngine, DestroyOnDevice> loaded(new LoadedEngine, DestroyOnDevice{options.device});
    loaded->device = options.device;
    loaded->description = sidecar.description;
    deserialize(*loaded, path, content);
    if (is_named(options.runtime_cache)) {
        loaded->cache.use(options.runtime_cache, digest, sidecar.description.sdk_version, card, *loaded->config);
    }
    return std::shared_ptr<const LoadedEngine>(std::move(loaded));
}

}  // namespace

// ------------------------------------------------------------------------------------------------------- the context

namespace internal {

// An input or output with its two places, each for the largest batch. `shape` is of one image.
struct Staged {
    std::string name;
    std::vector<int> shape;
    std::size_t row_bytes = 0;
    DeviceMemory device;
    PinnedMemory pinned;
    float* wanted = nullptr;  // where the answers of the current call go

    std::size_t values() const { return row_bytes / sizeof(float); }
};

// The computation of one batch size, and the context that it is bound to. Without a graph: recording it failed.
struct Recording {
    OwnedContext context;
    Executable graph;
};

constexpr std::size_t kMostGraphs = 16;

// All there is to a Context. Members are freed from the last to the first.
struct Running {
    std::shared_ptr<const LoadedEngine> loaded;
    ContextOptions options;
    Stream stream;
    DeviceMemory activations;
    Staged input;
    std::vector<Staged> outputs;
    std::array<Event, 4> events;  // around the copies and the computation; none without `timing`
    OwnedContext context;
    int batch_set = 0;  // in the shapes of `context`, which has run it; 0 for none
    std::map<int, Recording> recordings;
    Status graph_refusal;
    Times times;
    std::mutex busy;  // held by the thread that is in infer

    void allocate(const ContextOptions& given);
    void infer(const float* images, const Output* wanted, std::size_t count, int batch);
    int smallest() const { return loaded->description.profile[0][0]; }
    int largest() const { return loaded->description.profile[2][0]; }
    int graphs() const;
    const Staged* output(const char* name) const;

  private:
    std::vector<int> largest_shape() const;
    Staged staged(const std::string& name, const std::vector<int>& shape) const;
    void bind(nvinfer1::IExecutionContext& to) const;
    void set_batch(nvinfer1::IExecutionContext& of, int batch) const;
    void run_part(const float* images, int rows, Times& sum);
    void fill(const float* images, int rows, int given);
    void enqueue(int batch);
    void compute(int batch);
    void compile(nvinfer1::IExecutionContext& of) const;
    void mark(std::size_t place) const;
    void add_times(Times& sum) const;
    void record(int batch);
    Recording recorded(int batch) const;
};

std::vector<int> Running::largest_shape() const {
    const Profile& profile = loaded->description.profile;
    std::vector<int> shape = profile[1];
    shape[0] = largest();
    if (options.height == 0 && options.width == 0) return shape;
    if (shape.size() != 4) refuse(Code::kUsage, "height and width are given, and the engine's input is not images");
    if (options.height != 0) shape[2] = options.height;
    if (options.width != 0) shape[3] = options.width;
    for (std::size_t axis = 2; axis < 4; ++axis) {
        if (shape[axis] >= profile[0][axis] && shape[axis] <= profile[2][axis]) continue;
        refuse(Code::kUsage, text_of_size(shape[2], shape[3]) + " is outside of the engine's profile, " +
                                 text_of_size(profile[0][2], profile[0][3]) + " to " +
                                 text_of_size(profile[2][2], profile[2][3]));
    }
    return shape;
}

void Running::allocate(const ContextOptions& given) {
    options = given;
    const Description& description = loaded->description;
    const std::vector<int> shape = largest_shape();
    cudaStream_t made_stream = nullptr;
    check(cudaStreamCreateWithFlags(&made_stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    stream = Stream(made_stream);
    activations = device_memory(loaded->activations);
    context = loaded->new_context(activations);
    input = staged(description.input.name, shape);
    set_batch(*context, largest());
    for (const Tensor& output : description.outputs) {
        const std::vector<int> found = shape_of(context->getTensorShape(output.name.c_str()));
        if (found.empty() || found[0] != largest() || !is_form_of(found, output.shape)) {
            refuse(Code::kFile, "output " + output.name + " has not a row for each image" + kBuildAgain);
        }
        outputs.push_back(staged(output.name, found));
    }
    bind(*context);
    for (Event& event : events) {
        if (!options.timing) break;
        cudaEvent_t made_event = nullptr;
        check(cudaEventCreateWithFlags(&made_event, cudaEventDefault), "cudaEventCreateWithFlags");
        event = Event(made_event);
    }
}

Staged Running::staged(const std::string& name, const std::vector<int>& shape) const {
    Staged made;
    made.name = name;
    made.shape.assign(shape.begin() + 1, shape.end());
    made.row_bytes = bytes_of(made.shape);
    const std::size_t size = bytes_of(shape);
    made.device = device_memory(size);
    made.pinned = pinned_memory(size);
    return made;
}

void Running::bind(nvinfer1::IExecutionContext& to) const {
    answered(to.setTensorAddress(input.name.c_str(), input.device.get()), "setTensorAddress");
    for (const Staged& output : outputs) {
        answered(to.setTensorAddress(output.name.c_str(), output.device.get()), "setTensorAddress");
    }
}

void Running::set_batch(nvinfer1::IExecutionContext& of, int batch) const {
    nvinfer1::Dims dims = dims_of(input.shape);
    std::copy_backward(dims.d, dims.d + dims.nbDims, dims.d + dims.nbDims + 1);
    dims.d[0] = batch;
    ++dims.nbDims;
    answered(of.setInputShape(input.name.c_str(), dims), "setInputShape");
}

int Running::graphs() const {
    const auto is_made = [](const auto& entry) { return entry.second.graph.get() != nullptr; };
    return static_cast<int>(std::count_if(recordings.begin(), recordings.end(), is_made));
}

const Staged* Running::output(const char* name) const {
    const auto has_name = [name](const Staged& output) { return name != nullptr && output.name == name; };
    const auto found = std::find_if(outputs.begin(), outputs.end(), has_name);
    return found == outputs.end() ? nullptr : &*found;
}

void Running::infer(const float* images, const Output* wanted, std::size_t count, int batch) {
    if (images == nullptr || wanted == nullptr || count == 0)
        refuse(Code::kUsage, "no memory for images or answers is given");
    if (batch < 1) refuse(Code::kUsage, "a batch of " + std::to_string(batch) + "; give at least one image");
    for (Staged& staged : outputs) staged.wanted = nullptr;
    for (const Output* one = wanted; one != wanted + count; ++one) {
        const Staged* found = output(one->name);
        if (found == nullptr)
            refuse(Code::kUsage, std::string(one->name ? one->name : "(null)") + " is no output of this engine");
        if (one->values == nullptr) refuse(Code::kUsage, found->name + ": no memory for its answers is given");
        float*& place = outputs[static_cast<std::size_t>(found - outputs.data())].wanted;
        if (place != nullptr) refuse(Code::kUsage, found->name + ": is asked for twice");
        place = one->values;
    }
    const Selected current(loaded->device);
    Times sum;
    for (int start = 0; start < batch; start += std::min(largest(), batch - start)) {
        const int rows = std::min(largest(), batch - start);
        run_part(images + static_cast<std::size_t>(start) * input.values(), rows, sum);
        for (Staged& staged : outputs) {
            if (staged.wanted != nullptr) staged.wanted += static_cast<std::size_t>(rows) * staged.values();
        }
    }
    times = sum;
}

// Computes `rows` images, at most the largest batch, and copies their answers to where they are wanted.
void Running::run_part(const float* images, int rows, Times& sum) {
    const int given = std::max(rows, smallest());
    fill(images, rows, given);
    Work work(stream.get());
    enqueue(given);
    work.wait();
    add_times(sum);
    for (const Staged& output : outputs) {
        if (output.wanted == nullptr) continue;
        std::memcpy(output.wanted, output.pinned.get(), static_cast<std::size_t>(rows) * output.row_bytes);
    }
    record(given);
}

void Running::fill(const float* images, int rows, int given) {
    auto* target = static_cast<unsigned char*>(input.pinned.get());
    const std::size_t size = static_cast<std::size_t>(rows) * input.row_bytes;
    std::memcpy(target, images, size);
    for (int row = rows; row < given; ++row) {
        std::memcpy(target + static_cast<std::size_t>(row) * input.row_bytes, target + size - input.row_bytes,
                    input.row_bytes);
    }
}

void Running::enqueue(int batch) {
    const auto rows = static_cast<std::size_t>(batch);
    mark(0);
    check(cudaMemcpyAsync(input.device.get(), input.pinned.get(), rows * input.row_bytes, cudaMemcpyHostToDevice,
                          stream.get()),
          "cudaMemcpyAsync");
    mark(1);
    compute(batch);
    mark(2);
    for (const Staged& output : outputs) {
        if (output.wanted == nullptr) continue;
        check(cudaMemcpyAsync(output.pinned.get(), output.device.get(), rows * output.row_bytes, cudaMemcpyDeviceToHost,
                              stream.get()),
              "cudaMemcpyAsync");
    }
    mark(3);
}

void Running::compute(int batch) {
    const auto recording = recordings.find(batch);
    if (recording != recordings.end() && recording->second.graph.get() != nullptr) {
        check(cudaGraphLaunch(recording->second.graph.get(), stream.get()), "cudaGraphLaunch");
        return;
    }
    if (batch_set == batch) {
        answered(context->enqueueV3(stream.get()), "enqueueV3");
        return;
    }
    batch_set = 0;
    set_batch(*context, batch);
    compile(*context);
    batch_set = batch;
}

// The first run of a shape.
void Running::compile(nvinfer1::IExecutionContext& of) const {
    const std::shared_lock<std::shared_mutex> compiling(loaded->kernels);
    answered(of.enqueueV3(stream.get()), "enqueueV3");
}

void Running::mark(std::size_t place) const {
    if (options.timing) check(cudaEventRecord(events[place].get(), stream.get()), "cudaEventRecord");
}

void Running::add_times(Times& sum) const {
    if (!options.timing) return;
    const std::array<double*, 3> sums = {&sum.to_device, &sum.compute, &sum.to_host};
    for (std::size_t i = 0; i < sums.size(); ++i) {
        float milliseconds = 0;
        check(cudaEventElapsedTime(&milliseconds, events[i].get(), events[i + 1].get()), "cudaEventElapsedTime");
        *sums[i] += static_cast<double>(milliseconds) / 1000;
    }
}

// A graph saves time and changes nothing: where it cannot be had, the batch size goes on without, and that is said.
void Running::record(int batch) {
    if (!options.graph || recordings.count(batch) > 0) return;
    if (recordings.size() >= kMostGraphs) {
        graph_refusal = Status(Code::kUsage, "more than 16 batch sizes; the later ones have no graph");
        return;
    }
    const Status status = guarded([this, batch] {
        Recording& recording = recordings[batch];
        recording = recorded(batch);
    });
    if (status.ok()) return;
    static_cast<void>(take_last_error());
    graph_refusal = status;
}

// Runs once before it is recorded, since a new shape makes a context do what cannot be recorded.
Recording Running::recorded(int batch) const {
    Recording recording;
    recording.context = loaded->new_context(activations);
    Work work(stream.get());
    nvinfer1::IExecutionContext& own = *recording.context;
    set_batch(own, batch);
    bind(own);
    compile(own);
    work.wait();
    if (!is_capturable(own, stream.get(), 0))
        refuse(Code::kDevice, "this engine's work cannot be recorded as a CUDA graph");
    // Other threads may use the device meanwhile; only this one's calls are recorded.
    check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    const bool enqueued = own.enqueueV3(stream.get());
    cudaGraph_t made_graph = nullptr;
    const cudaError_t ended = cudaStreamEndCapture(stream.get(), &made_graph);
    const Graph graph(made_graph);
    answered(enqueued, "enqueueV3 into a CUDA graph");
    check(ended, "cudaStreamEndCapture");
    cudaGraphExec_t executable = nullptr;
    check(cudaGraphInstantiateWithFlags(&executable, graph.get(), 0), "cudaGraphInstantiateWithFlags");
    recording.graph = Executable(executable);
    return recording;
}

}  // namespace internal

namespace {

void release(std::unique_ptr<internal::Running>& running) noexcept {
    if (running == nullptr) return;
    on_device(running->loaded->device, [&running] { running.reset(); });
}

}  // namespace

// ----------------------------------------------------------------------------------------------------- the interface

Status Engine::load(const char* path, const LoadOptions& options, Engine& engine) noexcept {
    return guarded([&] {
        Logger::forget();
        if (path == nullptr) refuse(Code::kUsage, "no path of an engine is given");
        if (options.device < 0) {
            refuse(Code::kUsage, "device " + std::to_string(options.device) + ": GPUs are counted from 0");
        }
        if (!RuntimeCache::kIsKept && is_named(options.runtime_cache)) {
            refuse(Code::kUsage, std::string(options.runtime_cache) +
                                     ": full TensorRT compiles no kernels at run time, so "
                                     "it keeps no runtime cache; load without one");
        }
        engine.loaded_ = loaded_from_file(path, options);
    });
}

Status Engine::save_runtime_cache() const noexcept {
    return guarded([this] {
        Logger::forget();
        if (loaded_ == nullptr) refuse(Code::kUsage, "the engine is not loaded");
        const Selected current(loaded_->device);
        const std::lock_guard<std::shared_mutex> alone(loaded_->kernels);
        loaded_->cache.save();
    });
}

const char* Engine::runtime_cache_refusal() const noexcept {
    return loaded_ == nullptr ? "" : loaded_->cache.refusal();
}

const Description& Engine::description() const noexcept {
    static const Description none;
    return loaded_ == nullptr ? none : loaded_->description;
}

int Engine::device() const noexcept { return loaded_ == nullptr ? 0 : loaded_->device; }

Context::Context() noexcept = default;
Context::~Context() { release(running_); }
Context::Context(Context&& other) noexcept = default;
Context& Context::operator=(Context&& other) noexcept {
    if (this != &other) {
        release(running_);
        running_ = std::move(other.running_);
    }
    return *this;
}

Status Context::create(const Engine& engine, const ContextOptions& options, Context& context) noexcept {
    return guarded([&] {
        Logger::forget();
        if (!engine) refuse(Code::kUsage, "the engine is not loaded");
        const Selected current(engine.loaded_->device);
        auto running = std::make_unique<internal::Running>();
        running->loaded = engine.loaded_;
        running->allocate(options);
        release(context.running_);
        context.running_ = std::move(running);
    });
}

Status Context::infer(const float* input, const Output* outputs, std::size_t count, int batch) noexcept {
    return guarded([&] {
        if (running_ == nullptr) refuse(Code::kUsage, "the context is not created");
        Logger::forget();
        const std::unique_lock<std::mutex> alone(running_->busy, std::try_to_lock);
        if (!alone) refuse(Code::kUsage, "this context is at work in another thread; give each thread one of its own");
        running_->infer(input, outputs, count, batch);
    });
}

Status Context::infer(const float* input, float* output, int batch) noexcept {
    const char* name = "";
    if (running_ != nullptr) {
        if (running_->outputs.size() != 1)
            return Status(Code::kUsage, "the engine has several outputs; name those you want");
        name = running_->outputs[0].name.c_str();
    }
    const Output only = {name, output};
    return infer(input, &only, 1, batch);
}

std::size_t Context::input_values() const noexcept { return running_ == nullptr ? 0 : running_->input.values(); }

std::size_t Context::output_values(const char* name) const noexcept {
    const internal::Staged* output = running_ == nullptr ? nullptr : running_->output(name);
    return output == nullptr ? 0 : output->values();
}

const std::vector<int>& Context::output_shape(const char* name) const noexcept {
    static const std::vector<int> none;
    const internal::Staged* output = running_ == nullptr ? nullptr : running_->output(name);
    return output == nullptr ? none : output->shape;
}

int Context::smallest_batch() const noexcept { return running_ == nullptr ? 0 : running_->smallest(); }
int Context::largest_batch() const noexcept { return running_ == nullptr ? 0 : running_->largest(); }
int Context::graphs() const noexcept { return running_ == nullptr ? 0 : running_->graphs(); }
const char* Context::graph_refusal() const noexcept {
    return running_ == nullptr ? "" : running_->graph_refusal.message();
}
Times Context::times() const noexcept { return running_ == nullptr ? Times() : running_->times; }

Status read_file(const char* path, std::size_t limit, std::vector<unsigned char>& content) noexcept {
    return guarded([&] {
        if (path == nullptr) refuse(Code::kUsage, "no path is given");
        content = bytes_of_file(path, limit);
    });
}

}  // namespace repvgg
