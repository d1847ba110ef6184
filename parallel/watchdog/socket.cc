#include "parallel/watchdog/socket.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/error.h"

namespace hybridmoe::watchdog {
namespace {

constexpr int kKind = SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC;

[[noreturn]] void fail(const std::string& doing, int error = errno) {
  throw Error(cat(doing, ": ", std::strerror(error)));
}

// Messages are small and each matters at once.
void send_at_once(int descriptor) {
  const int on = 1;
  ::setsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

// Not open when the system lacks this kind of address.
Socket bound(const sockaddr* address, socklen_t bytes) {
  Socket socket(::socket(address->sa_family, kKind, 0));
  if (!socket.is_open()) return {};
  const int off = 0;  // one socket for both versions of IP
  if (address->sa_family == AF_INET6) {
    ::setsockopt(socket.descriptor(), IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
  }
  if (::bind(socket.descriptor(), address, bytes) != 0) return {};
  return socket;
}

}  // namespace

Socket::~Socket() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

Socket listen_on_any_port(bool loopback_only, int* port) {
  sockaddr_in6 six{};
  six.sin6_family = AF_INET6;
  six.sin6_addr = in6addr_any;
  sockaddr_in four{};
  four.sin_family = AF_INET;
  four.sin_addr.s_addr = htonl(loopback_only ? INADDR_LOOPBACK : INADDR_ANY);
  Socket socket;
  if (!loopback_only) socket = bound(reinterpret_cast<const sockaddr*>(&six), sizeof six);
  if (!socket.is_open()) socket = bound(reinterpret_cast<const sockaddr*>(&four), sizeof four);
  if (!socket.is_open() || ::listen(socket.descriptor(), SOMAXCONN) != 0) fail("listening on a TCP port");
  sockaddr_storage own{};
  socklen_t bytes = sizeof own;
  if (::getsockname(socket.descriptor(), reinterpret_cast<sockaddr*>(&own), &bytes) != 0) {
    fail("asking for the port");
  }
  *port = ntohs(own.ss_family == AF_INET6 ? reinterpret_cast<const sockaddr_in6&>(own).sin6_port
                                          : reinterpret_cast<const sockaddr_in&>(own).sin_port);
  return socket;
}

Socket accept_from(const Socket& listener) {
  Socket socket(::accept4(listener.descriptor(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (socket.is_open()) send_at_once(socket.descriptor());
  return socket;
}

Socket connect_to(const std::string& address, int port, double seconds) {
  const std::string doing = cat("connecting to ", address, " port ", port);
  addrinfo wanted{}, *found = nullptr;
  wanted.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
  wanted.ai_socktype = SOCK_STREAM;
  if (const int code = ::getaddrinfo(address.c_str(), std::to_string(port).c_str(), &wanted, &found);
      code != 0) {
    throw Error(cat(doing, ": ", ::gai_strerror(code)));
  }
  Socket socket(::socket(found->ai_family, kKind, 0));
  const bool started =
      socket.is_open() &&
      (::connect(socket.descriptor(), found->ai_addr, found->ai_addrlen) == 0 || errno == EINPROGRESS);
  const int error = errno;
  ::freeaddrinfo(found);
  if (!started) fail(doing, error);
  pollfd ready{socket.descriptor(), POLLOUT, 0};
  int events = 0;
  do {
    events = ::poll(&ready, 1, static_cast<int>(seconds * 1000));
  } while (events < 0 && errno == EINTR);
  require(events != 0, doing, ": no answer within ", seconds, " s");
  int outcome = 0;
  socklen_t bytes = sizeof outcome;
  ::getsockopt(socket.descriptor(), SOL_SOCKET, SO_ERROR, &outcome, &bytes);
  if (outcome != 0) fail(doing, outcome);
  send_at_once(socket.descriptor());
  return socket;
}

std::vector<std::string> local_addresses() {
  std::vector<std::string> near, far;
  ifaddrs* interfaces = nullptr;
  if (::getifaddrs(&interfaces) != 0) fail("asking for the network interfaces");
  for (const ifaddrs* each = interfaces; each != nullptr; each = each->ifa_next) {
    if (each->ifa_addr == nullptr || (each->ifa_flags & IFF_UP) == 0) continue;
    const int family = each->ifa_addr->sa_family;
    if (family != AF_INET && family != AF_INET6) continue;
    // Addresses that are valid on one link need the name of an interface, which differs between hosts.
    if (family == AF_INET6 &&
        IN6_IS_ADDR_LINKLOCAL(&reinterpret_cast<const sockaddr_in6*>(each->ifa_addr)->sin6_addr)) {
      continue;
    }
    char text[NI_MAXHOST];
    const socklen_t bytes = family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
    if (::getnameinfo(each->ifa_addr, bytes, text, sizeof text, nullptr, 0, NI_NUMERICHOST) != 0) continue;
    ((each->ifa_flags & IFF_LOOPBACK) != 0 ? near : far).emplace_back(text);
  }
  ::freeifaddrs(interfaces);
  far.insert(far.end(), near.begin(), near.end());
  return far;
}

bool is_loopback(const std::string& address) { return address == "::1" || address.rfind("127.", 0) == 0; }

std::string host_name() {
  char name[256] = {};
  ::gethostname(name, sizeof name - 1);
  return name;
}

}  // namespace hybridmoe::watchdog
